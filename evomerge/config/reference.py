"""The reference of the search file: every key with its type, default and description, from the schema."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from evomerge.config import listener_schema, schema, stage_schema
from evomerge.config.messages import block_of
from evomerge.config.renamed_keys import RENAMED
from evomerge.config.schema import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation.lm_harness.backends import BACKENDS
from evomerge.optimizers import OPTIMIZERS

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
_IN_WORDS = {
    "evaluation.items": "whole number from 1, or task -> whole number from 1",
    "tasks[].search": "metric, probability or logprob, or one of these -> number above 0",
    "tasks[].items": "role -> list of document numbers or item ids, or path of a file; or null",
    "evaluation.backend": ", ".join(BACKENDS),
    "search.optimizer": ", ".join(OPTIMIZERS),
    "stages[].stage": " or ".join(STAGES),
    "routes.optimizer": f"{', '.join(OPTIMIZERS)} or null",
}
"""Keys whose type is checked by a function, in words."""


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key of the search file.

    Attributes:
        path: Path such as `search.race.error`; NAME stands for a name that the user gives, [] for an entry of
            a list.
        type: What the value is, in words.
        default: The value where the key is left out, as YAML; 'required' where it must be given.
        description: One sentence.
        renamed_from: Path of the key's old name, '' where it has none.
    """

    path: str
    type: str
    default: str
    description: str
    renamed_from: str = ""


def rows() -> list[KeyRow]:
    """All keys of the search file, in the order of the schema: a block's own row, then the keys in it."""
    return list(_rows(Config, ""))


def block_descriptions() -> dict[str, str]:
    """Path of each block, '' for the whole file -> the first sentence of its description."""
    descriptions = {"": _first_sentence(Config)}
    for path, block in _blocks(Config, ""):
        descriptions[path] = _first_sentence(block)
    return descriptions


def type_in_words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Says what a key's value is.

    Args:
        annotation: The key's type.
        metadata: Bounds that pydantic keeps beside the type.

    Returns:
        Words such as 'whole number from 1, or null'.
    """
    alternatives = list(dict.fromkeys(_alternatives(annotation, metadata)))
    if len(alternatives) == 1:
        return alternatives[0]
    return f"{', '.join(alternatives[:-1])} or {alternatives[-1]}"


def _alternatives(annotation: Any, metadata: tuple[Any, ...]) -> Iterator[str]:
    """Words for each of the types that a union or a literal allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(arguments[0], tuple(_bounds(arguments[1:])) + metadata)
    elif origin in (types.UnionType, typing.Union):
        for argument in arguments:
            yield from _alternatives(argument, metadata)
    elif origin is typing.Literal:
        yield from (str(argument) for argument in arguments)
    else:
        yield _one_type(annotation, metadata)


def _one_type(annotation: Any, metadata: tuple[Any, ...]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {type_in_words(arguments[0])}"
        return f"[{', '.join(type_in_words(argument) for argument in arguments)}]"
    if origin is dict:
        return f"{type_in_words(arguments[0])} -> {type_in_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    word = _WORDS[annotation]
    limits = [limit for bound in metadata if (limit := _limit(bound))]
    return f"{word} {' and '.join(limits)}" if limits and annotation in (int, float) else word


def _rows(block: type[BaseModel], prefix: str) -> Iterator[KeyRow]:
    descriptions = _descriptions()[block.__name__]
    renamed_from = {new: old for old, new in RENAMED.items()}
    for name, field in block.model_fields.items():
        path = prefix + name
        yield KeyRow(
            path=path,
            type=_type(path, field),
            default=_default(field),
            description=descriptions.get(name, ""),
            renamed_from=renamed_from.get(path, ""),
        )
        inner = block_of(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{_inside(path, field)}.")


def _blocks(block: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in block.model_fields.items():
        inner = block_of(field.annotation)
        if inner is not None:
            path = _inside(prefix + name, field)
            yield path, inner
            yield from _blocks(inner, f"{path}.")


def _inside(path: str, field: FieldInfo) -> str:
    """Path of a block in a key: of an entry, where the key has several."""
    origin = typing.get_origin(field.annotation)
    if origin is dict:
        return f"{path}.NAME"
    if origin is tuple:
        return f"{path}[]"
    return path


def _type(path: str, field: FieldInfo) -> str:
    if path in _IN_WORDS:
        return _IN_WORDS[path]
    return type_in_words(field.annotation, tuple(_bounds(tuple(field.metadata))))


def _bounds(metadata: tuple[Any, ...]) -> Iterator[Any]:
    """Bounds among the metadata of a type, also those inside a `Field`."""
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            yield from entry.metadata
        else:
            yield entry


def _limit(bound: Any) -> str:
    """A bound in words, '' for metadata that is none."""
    if isinstance(bound, annotated_types.Ge):
        return f"from {bound.ge}"
    if isinstance(bound, annotated_types.Gt):
        return f"above {bound.gt}"
    if isinstance(bound, annotated_types.Le):
        return f"up to {bound.le}"
    if isinstance(bound, annotated_types.Lt):
        return f"below {bound.lt}"
    return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    if isinstance(value, BaseModel):
        return "its defaults"
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value


def _first_sentence(block: type[BaseModel]) -> str:
    """The first paragraph of a block's docstring, on one line."""
    paragraph = inspect.getdoc(block) or ""
    return " ".join(paragraph.split("\n\n")[0].split()).removesuffix("::").removesuffix(",")


@functools.cache
def _descriptions() -> dict[str, dict[str, str]]:
    """Class of the schema -> key -> the text under it, on one line."""
    descriptions: dict[str, dict[str, str]] = {}
    sources = [inspect.getsource(module) for module in (schema, stage_schema, listener_schema)]
    for definition in [node for source in sources for node in ast.parse(source).body]:
        if not isinstance(definition, ast.ClassDef):
            continue
        keys = descriptions.setdefault(definition.name, {})
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                keys[statement.target.id] = " ".join(text.value.split())
    return descriptions
