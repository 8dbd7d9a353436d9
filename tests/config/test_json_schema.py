"""The JSON Schema of the search file: what is shipped is valid, and it refuses what the loader refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from evomerge import _resources, _yaml
from evomerge.config import loading
from evomerge.config.json_schema import schema
from evomerge.config.reference import rows
from evomerge.errors import ConfigError

GOOD: dict[str, Any] = {
    "study": "trial",
    "models": {"base": "x", "math": {"path": "y", "revision": None}},
    "base": "base",
    "method": "ties",
    "tasks": [{"task": "first"}],
}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    found = schema()
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


@pytest.mark.parametrize("name", sorted(_resources.search_spaces()))
def test_what_is_shipped_is_valid(name: str, validator: Draft202012Validator) -> None:
    document = _yaml.read(_resources.search_spaces()[name])
    assert list(validator.iter_errors(document.data)) == []


# (keys that are put into a good file, whether it is one still)
CASES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"stages": ["weights", {"stage": "routes", "evaluations": 5}]}, True),
    ({"stages": ["wieghts"]}, False),
    ({"stages": [{"stage": "weights", "evaluatons": 5}]}, False),
    ({"studdy": 1}, False),
    ({"study": "a b"}, False),
    ({"models": {"base": "x"}}, False),
    ({"models": {"base": 3, "math": "y"}}, False),
    ({"models": {"base": "x", "math": "y", "license": "permissive"}}, True),
    ({"models": {"base": "x", "math": "y", "license": ["mit"]}}, True),
    ({"license": "free"}, False),
    ({"tasks": []}, False),
    ({"tasks": [{"task": "t", "weight": 0}]}, False),
    ({"tasks": [{"weight": 1}]}, False),
    ({"tasks": [{"python": "m:f", "name": "mine"}]}, True),
    ({"tasks": [{"task": "t", "search": "probability"}]}, True),
    ({"tasks": [{"task": "t", "search": {"metric": 0.7, "logprob": 0.3}}]}, True),
    ({"tasks": [{"task": "t", "search": {"metric": 0}}]}, False),
    ({"tasks": [{"task": "t", "items": {"search": [1, 2], "test": "ids.txt"}}]}, True),
    ({"tasks": [{"task": "t", "num_fewshot": -1}]}, False),
    ({"space": {"groups": [2, 3], "parameters": {"weight": {"low": 0, "high": 1, "start": 0.5}}}}, True),
    ({"space": {"groups": 2, "parameters": {"weight": 0.5, "normalize": True}}}, True),
    ({"space": {"parameters": {"weight": {"low": 0, "high": 1, "begin": 0.5}}}}, False),
    ({"space": {"components": ["atention"]}}, False),
    ({"evaluation": {"items": {"first": 30}}}, True),
    ({"evaluation": {"backend": "compiled"}}, True),
    ({"evaluation": {"backend": "vlm"}}, False),
    ({"search": {"population": "auto", "islands": 3, "race": {"error": 0.1}}}, True),
    ({"search": {"population": 3}}, False),
    ({"search": {"optimizer": "no such"}}, False),
    ({"search": {"seed": -1}}, False),
    ({"hand_recipes": {"mine": "recipe.yml"}, "search": {"start": "mine"}}, True),
    ({"keep": {"first": 0.02}}, True),
    ({"keep": {"first": -0.02}}, False),
    ({"cluster": {"ray": "auto", "gpus": 0.5, "limits": {"factor": 2}}, "budget": {"hours": 2}}, True),
    ({"budget": {"hours": 0}}, False),
]


@pytest.mark.parametrize(("change", "is_valid"), CASES, ids=lambda value: json.dumps(value)[:60])
def test_the_schema_agrees_with_the_loader(
    change: dict[str, Any], is_valid: bool, validator: Draft202012Validator
) -> None:
    document = GOOD | change
    assert validator.is_valid(document) is is_valid
    if is_valid:
        loading.check(_yaml.parse(json.dumps(document), "file"))
    else:
        with pytest.raises(ConfigError):
            loading.check(_yaml.parse(json.dumps(document), "file"))


def test_every_key_has_its_description() -> None:
    found = schema()
    text = json.dumps(found)
    for row in rows():
        assert json.dumps(row.description)[1:-1] in text, row.path
    assert '"title": "' not in text.partition("\n")[0].replace('"title": "evomerge search file"', "")
    assert found["properties"]["method"]["description"]
