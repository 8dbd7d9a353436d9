"""What is said of a mistake in a search file is said in our words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from evomerge import _resources as resources
from evomerge import _yaml
from evomerge.config import loading, messages
from evomerge.config.schema import Config
from evomerge.errors import ConfigError

_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e99, math.nan, "x", "", [], {}, [1, 2], {"a": 1}, [[]], [{"x": 1}]),
    *({"low": 1, "high": 2, "start": 5}, {"low": 1}, {"low": "x", "high": 2, "start": 1.5}),
)
_FOREIGN = (
    r"function-|\[_|[A-Z]\w*Config\b|pydantic|Input should|type=|tuple\[|dict\[|another value|validator"
)


def _keys(block: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in block.model_fields.items():
        yield (*path, name)
        inner = messages.block_of(field.annotation)
        if inner is not None and len(path) < 3:
            yield from _keys(inner, (*path, name))


@pytest.mark.parametrize("path", list(_keys(Config, ())), ids=".".join)
def test_no_word_of_the_validation_library_reaches_a_user(path: tuple[str, ...]) -> None:
    entries = {"models": "math", "parameters": "weight", "tasks": 0, "stages": 0}
    said: list[str] = []
    for value in _VALUES:
        document = yaml.safe_load(resources.search_spaces()["demo"].read_text())
        document["stages"] = [{"stage": "weights"}]
        document["models"]["math"] = {"path": "x"}
        document["search"] |= {"race": {}}
        block: Any = document
        for name in path[:-1]:
            block = block.setdefault(name, {})
            if name in entries:
                block = block[entries[name]]
        block[path[-1]] = value
        try:
            loading.check(_yaml.parse(yaml.safe_dump(document, sort_keys=False), "f"))
        except ConfigError as error:
            said.append(f"{value!r}: {error}")
    assert [sentence for sentence in said if re.search(_FOREIGN, sentence)] == []


@pytest.mark.parametrize(("flag", "value"), [("grace", "nan"), ("gpus", "nan")])
def test_nor_through_a_flag(flag: str, value: str) -> None:
    settings, _ = loading.load("demo")
    given: dict[str, Any] = dict.fromkeys(("ray", "workers", "gpus", "grace", "reuse"))
    with pytest.raises(ConfigError, match=f"--{flag} should be a finite number"):
        loading.placed(settings, **(given | {flag: float(value)}))
