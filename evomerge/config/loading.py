"""The search file: one YAML document, checked field by field; errors name file, line, column and the nearest right key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from evomerge import _resources, _yaml
from evomerge.config.schema import (
    BudgetConfig,
    ClusterConfig,
    Config,
    EvaluationConfig,
    GateConfig,
    LimitsConfig,
    ModelConfig,
    RaceConfig,
    RangeConfig,
    RoutesConfig,
    SearchConfig,
    SpaceConfig,
    StageConfig,
    TaskConfig,
)
from evomerge.errors import ConfigError, suggest


def load(reference: str) -> tuple[Config, str]:
    """(configuration, its YAML verbatim) from a file, or from a shipped search space of that name."""
    shipped = _resources.search_spaces()
    path = Path(reference)
    if not path.is_file() and reference in shipped:
        path = shipped[reference]
    if not path.exists():
        raise ConfigError(
            f"there is no search file '{reference}'. {suggest(reference, shipped)} These are shipped; or give a path."
        )
    document = _yaml.read(path)
    return check(document), document.text


def stored(study: str, text: str, overrides: Mapping[str, int]) -> tuple[Config, str]:
    """The configuration of a stored study, flags applied, and its YAML."""
    return override(check(_yaml.parse(text, f"{study} (stored)")), overrides), text


def rename(text: str, study: str) -> tuple[Config, str]:
    """The configuration under another study name, in the settings and in its YAML."""
    document = _yaml.parse(text, "the search file")
    lines = text.splitlines(keepends=True)
    line = document.marks.get(("study",), (0, 0))[0] - 1
    if line < 0 or not re.match(r"""["']?study["']?\s*:\s*[^\s#]""", lines[line]):
        raise ConfigError("--study needs a search file with its `study:` name on one line")
    lines[line] = f"study: {json.dumps(study)}\n"
    renamed = "".join(lines)
    return check(_yaml.parse(renamed, f"--study {study}")), renamed


def override(settings: Config, overrides: Mapping[str, int]) -> Config:
    """The settings with `evaluations`, of the last stage, or `seed` of the search replaced."""
    try:
        given = dict(overrides)
        if len(settings.stages) > 1 and "evaluations" in given:
            last = settings.stages[-1].model_dump() | {"evaluations": given.pop("evaluations")}
            settings = settings.model_copy(
                update={"stages": (*settings.stages[:-1], StageConfig.model_validate(last))}
            )
        elif "evaluations" in given:
            settings = settings.model_copy(
                update={"stages": (settings.stages[0].model_copy(update={"evaluations": None}),)}
            )
        return settings.model_copy(
            update={"search": SearchConfig.model_validate(settings.search.model_dump() | given)}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{_sentence(first, first['loc'])}") from None


def placed(
    settings: Config,
    *,
    ray: str | None,
    workers: int | None,
    gpus: float | None,
    grace: float | None,
    reuse: Sequence[str] | None,
) -> Config:
    """The settings with what flags say of where and beside what they run."""
    given = {
        k: v
        for k, v in (("ray", ray), ("workers", workers), ("gpus", gpus), ("grace", grace))
        if v is not None
    }
    cluster = ClusterConfig.model_validate(settings.cluster.model_dump() | given)
    return settings.model_copy(update={"cluster": cluster, "reuse": (*settings.reuse, *(reuse or ()))})


def check(document: _yaml.Document) -> Config:
    """The configuration in a document; raises ConfigError for the first thing wrong in it."""
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{document.where()} must be a mapping with keys such as study, models, base, method, tasks"
        )

    def fail(path: _yaml.Key, message: str) -> ConfigError:
        return ConfigError(
            f"{document.where(path)} {' '.join(message.split())}"
        )  # one line, whatever names the file gives

    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        # of all that is wrong, a misspelt key says most, then what lies deepest
        placed = [(e, _path(e["loc"], document.data)) for e in error.errors()]
        first, path = min(placed, key=lambda pair: (_unlike(pair[0], pair[1]), -len(pair[1])))
        raise fail(path, _sentence(first, path)) from None
    from evomerge.methods import METHODS

    if config.base not in config.models:
        raise fail(
            ("base",), f"base '{config.base}' is not among the models. {suggest(config.base, config.models)}"
        )
    if config.method not in METHODS:
        raise fail(("method",), f"unknown method '{config.method}'. {suggest(config.method, METHODS)}")
    method = METHODS[config.method]
    least, most = method.models
    if not least <= len(config.parents) <= most:
        raise fail(
            ("models",),
            f"{method.name} takes {least} to {most} models besides the base, got {len(config.parents)}",
        )
    for name, value in config.space.parameters.items():
        place = ("space", "parameters", name)
        param = method.param(name)
        if param is None:
            raise fail(
                place,
                f"{method.name} has no parameter '{name}'. {suggest(name, [p.name for p in method.params])}",
            )
        if param.flag and (isinstance(value, RangeConfig) or value not in (0, 1)):
            raise fail(place, f"{name} is a switch: true or false, not searched")
        for number in (value.low, value.high) if isinstance(value, RangeConfig) else (float(value),):
            if not param.hard_low <= number <= param.hard_high:
                raise fail(
                    place, f"{name} must be in [{param.hard_low:g}, {param.hard_high:g}], got {number:g}"
                )
    if isinstance(config.space.groups, tuple) and (not config.space.groups or min(config.space.groups) < 1):
        raise fail(("space", "groups"), f"groups are sizes of at least 1, got {list(config.space.groups)}")
    if isinstance(config.space.groups, int) and config.space.groups < 1:
        raise fail(("space", "groups"), f"groups must be at least 1, got {config.space.groups}")
    for component in config.space.components:
        if config.space.components.count(component) > 1:
            raise fail(("space", "components"), f"component '{component}' is listed twice")
    if config.kinds not in _STAGES:
        known = "; ".join(", ".join(kinds) for kinds in _STAGES)
        raise fail(("stages",), f"stages are one of: {known}; got {', '.join(config.kinds)}")
    if config.search.race is not None and config.search.pipelined:
        raise fail(
            ("search", "pipelined"),
            "a search is raced or pipelined, not both; leave out search.race or search.pipelined",
        )
    routed: list[tuple[_yaml.Key, str]] = [
        (("routes", "models", i), m) for i, m in enumerate(config.routes.models)
    ]
    routed += [(("routes", "start"), config.routes.start)] if config.routes.start != "best" else []
    for where, name in routed:
        if name not in config.models:
            raise fail(where, f"'{name}' is not among the models. {suggest(name, config.models)}")
    names = [t.task for t in config.tasks]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise fail(("tasks", i, "task"), f"task '{name}' is listed twice; give it one entry and a weight")
    sizes = config.evaluation.items
    asked: list[tuple[_yaml.Key, Sequence[str]]] = [(("keep",), list(config.keep))]
    asked += [(("evaluation", "items"), list(sizes))] if isinstance(sizes, dict) else []
    for path, named in asked:
        for name in named:
            if name not in names:
                raise fail((*path, name), f"'{name}' is not among the tasks. {suggest(name, names)}")
    return config


_STAGES = (
    ("weights",),
    ("routes",),
    ("weights", "routes"),
    ("routes", "weights"),
    ("weights", "routes", "weights"),
)


def _unlike(error: Any, path: _yaml.Key) -> bool:
    """False for an unknown key that resembles a known one."""
    return error["type"] != "extra_forbidden" or not get_close_matches(str(path[-1]), _known(path[:-1]))


def _path(loc: Sequence[str | int], data: Any) -> _yaml.Key:
    """pydantic's location without the names of its own types: only steps the document has, and a last missing key."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        step: Any = data
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            data = step[part]
            path.append(part)
        elif i == len(loc) - 1 and isinstance(data, dict):
            path.append(part)
    return tuple(path)


def _sentence(error: Any, path: _yaml.Key) -> str:
    """One sentence for one pydantic error."""
    name = ".".join(str(p) for p in path) or "the file"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{name}'. {suggest(str(path[-1]), _known(path[:-1]))}"
    if error["type"] == "missing":
        return f"'{name}' is missing; it is required"
    message = error["msg"].removeprefix("Value error, ")
    seen = error.get("input")
    shown = f", got {seen!r}" if isinstance(seen, str | int | float | bool | type(None)) else ""
    return f"{name}: {message[0].lower()}{message[1:]}{shown}"


def _known(path: _yaml.Key) -> list[str]:
    """The keys allowed at a path."""
    model: type[BaseModel] = Config
    steps: dict[str, type[BaseModel]] = {
        "models": ModelConfig,
        "space": SpaceConfig,
        "parameters": RangeConfig,
        "tasks": TaskConfig,
        "evaluation": EvaluationConfig,
        "search": SearchConfig,
        "race": RaceConfig,
        "stages": StageConfig,
        "routes": RoutesConfig,
        "gate": GateConfig,
        "cluster": ClusterConfig,
        "limits": LimitsConfig,
        "budget": BudgetConfig,
    }
    for part in path:
        model = steps.get(str(part), model)
    return list(model.model_fields)
