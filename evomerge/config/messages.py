"""What pydantic finds wrong in a search file, in our words: the key, what it should be, what was given."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from evomerge import _yaml
from evomerge.config.schema import Config
from evomerge.errors import suggest

_SHOULD_BE = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 18 digits",
    "int_type": "a whole number",
    "is_instance_of": "a {class}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "string_type": "text (a string)",
    "tuple_type": "a list",
}
"""pydantic's type of error -> what the value should be, with the numbers of the error's context."""


def most_telling(errors: Sequence[Any], data: Any) -> tuple[Any, _yaml.Key]:
    """Chooses which of pydantic's errors to report.

    Args:
        errors: Errors as `pydantic.ValidationError.errors` gives them, at least one.
        data: The document that was checked.

    Returns:
        (error, path of its key): a misspelt key before all others, then what lies deepest.
    """
    placed = [(error, _path(error["loc"], data, error["type"] == "missing")) for error in errors]
    return min(placed, key=lambda pair: (not _is_misspelt(pair[0], pair[1]), -len(pair[1])))


def sentence(error: Any, path: _yaml.Key) -> str:
    """Says in a sentence what is wrong.

    Args:
        error: One of pydantic's errors.
        path: Path of its key.

    Returns:
        The key, what it should be, and what was given.
    """
    name = ".".join(str(part) for part in path) or "the file"
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown key '{name}'. {suggest(str(path[-1]), known_keys(path[:-1]))}"
    if kind == "missing":
        return f"'{name}' is missing; it is required"
    given = error.get("input")
    got = f", got {given!r}" if isinstance(given, str | int | float | bool | type(None)) else ""
    context = error.get("ctx", {})
    if kind == "value_error":
        message = str(context["error"])
        separator = " " if message.startswith("should ") else ": "
        return f"{name}{separator}{message[0].lower()}{message[1:]}{got}"
    if kind in ("too_short", "too_long"):
        bound, limit = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        count = context[limit]
        entries = "entry" if count == 1 else "entries"
        return f"{name} should have at {bound} {count} {entries}, got {context['actual_length']}"
    should_be = _SHOULD_BE.get(kind, "another value").format(**context)
    return f"{name} should be {should_be}{got}"


def known_keys(path: _yaml.Key) -> list[str]:
    """Lists the keys that a block may have.

    Args:
        path: Path of the block in the search file.

    Returns:
        Its keys, in the order of the schema.
    """
    block: type[BaseModel] = Config
    for part in path:
        field = block.model_fields.get(str(part))
        inner = None if field is None else block_of(field.annotation)
        block = inner or block
    return list(block.model_fields)


def block_of(annotation: Any) -> type[BaseModel] | None:
    """Finds the block in the type of a key, also in a list, mapping or union of blocks.

    Args:
        annotation: Type of a key.

    Returns:
        The block, None where the key has none.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        block = block_of(inner)
        if block is not None:
            return block
    return None


def _is_misspelt(error: Any, path: _yaml.Key) -> bool:
    """Whether it is an unknown key that resembles a known one."""
    if error["type"] != "extra_forbidden":
        return False
    return bool(get_close_matches(str(path[-1]), known_keys(path[:-1])))


def _path(location: Sequence[str | int], data: Any, is_missing: bool) -> _yaml.Key:
    """pydantic's location without names of types: steps that the document has, and a missing key."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        in_mapping = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_mapping or in_list:
            data = data[part]
            path.append(part)
        elif i == len(location) - 1 and is_missing:
            path.append(part)
    return tuple(path)
