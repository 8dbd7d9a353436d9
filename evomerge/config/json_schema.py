"""The JSON Schema of the search file, for editors: every key with type, bounds, default and description."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from evomerge.config.reference import block_descriptions, rows
from evomerge.config.schema import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation.lm_harness.backends import BACKENDS
from evomerge.optimizers import OPTIMIZERS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LISTED = {  # keys that a function checks -> what it allows
    "evaluation.backend": [*BACKENDS],
    "search.optimizer": [*OPTIMIZERS],
    "routes.optimizer": [*OPTIMIZERS],
    "stages[].stage": [*STAGES],
}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""pydantic's words, which it leaves beside a type that a function checks first -> JSON Schema's."""


def schema() -> dict[str, Any]:
    """The schema of a search file as users may write it, short forms included.

    Returns:
        Plain data: JSON Schema 2020-12, whose blocks are under `$defs`.
    """
    data = copy.deepcopy(Config.model_json_schema())
    definitions = data["$defs"]
    _describe(data, definitions)
    _allow_short_forms(data, definitions)
    for node in _nodes(data):
        if isinstance(node.get("title"), str):  # the name of a class or key once more
            del node["title"]
        for ours, theirs in _BOUNDS.items():
            if isinstance(node.get(ours), int | float):
                node[theirs] = node.pop(ours)
    data["properties"]["stages"]["default"] = ["weights"]
    return {
        "$schema": _DIALECT,
        "title": "evomerge search file",
        "description": block_descriptions()[""],
        **{key: value for key, value in data.items() if key != "description"},
    }


def _allow_short_forms(data: dict[str, Any], definitions: dict[str, Any]) -> None:
    """What the blocks' own validators make of a text, a number or a measure alone."""
    properties = data["properties"]
    model = properties["models"]["additionalProperties"]
    properties["models"]["additionalProperties"] = {"anyOf": [{"type": "string", "minLength": 1}, model]}
    license_ = {key: value for key, value in properties["license"].items() if key != "default"}
    properties["models"]["properties"] = {"license": license_}  # read inside models too
    stage = properties["stages"]["items"]
    properties["stages"]["items"] = {"anyOf": [{"enum": list(STAGES)}, stage]}
    task = definitions["TaskConfig"]
    task["required"] = []
    task["anyOf"] = [{"required": ["task"]}, {"required": ["python", "name"]}]
    shares = task["properties"]["search"]
    described = {key: shares.pop(key) for key in ("description", "default") if key in shares}
    measures = shares.get("propertyNames", {"type": "string"})
    task["properties"]["search"] = {"anyOf": [measures, shares], **described}


def _describe(data: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Writes the description of each key, and the values of keys that a function checks."""
    by_path = {row.path: row for row in rows()}
    for path, node in _keys(data, definitions, ""):
        row = by_path[path]
        if row.description:
            node["description"] = row.description
        if path in _LISTED:
            _enumerate(node, _LISTED[path])


def _enumerate(node: dict[str, Any], names: list[str]) -> None:
    for alternative in node.get("anyOf", [node]):
        if alternative.get("type") == "string":
            alternative["enum"] = names


def _keys(
    block: dict[str, Any], definitions: dict[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path as `reference.rows` spells it, node) of every key below a block."""
    for name, node in block.get("properties", {}).items():
        path = prefix + name
        yield path, node
        inside = path
        if "additionalProperties" in node and isinstance(node["additionalProperties"], dict):
            inside = f"{path}.NAME"
        elif node.get("type") == "array":
            inside = f"{path}[]"
        for reference in _references(node):
            yield from _keys(definitions[reference], definitions, f"{inside}.")


def _references(node: Any) -> Iterator[str]:
    """Names of the definitions that a key's value may be."""
    for part in _nodes(node):
        if "$ref" in part:
            yield part["$ref"].rsplit("/", 1)[-1]


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in plain data, the outermost first, references not followed."""
    if isinstance(node, dict):
        yield node
        for value in list(node.values()):
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)
