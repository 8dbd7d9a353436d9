"""Keys of the search file with another name now; the old name is read for one version, with a warning."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from evomerge import _yaml
from evomerge.errors import ConfigError

log = logging.getLogger(__name__)

RENAMED = {
    "routes.gate": "routes.perplexity_screen",
    "routes.changes": "routes.expected_mutations",
}
"""Old path -> new path, in the same block."""
_POLICIES = ("any", "permissive")


def rename_keys(document: _yaml.Document, *, warn: bool = True) -> _yaml.Document:
    """Gives old keys of a search file their new names.

    Args:
        document: A search file as read.
        warn: Log a warning for each old key that names the new one; not for the stored file of an old study.

    Returns:
        The document with the new names, at the old keys' places.

    Raises:
        ConfigError: A key is there under both names.
    """
    for old, new in RENAMED.items():
        *block_path, old_key = old.split(".")
        new_key = new.split(".")[-1]
        block = _block(document.data, block_path)
        if block is None or old_key not in block:
            continue
        place = document.where((*block_path, old_key))
        if new_key in block:
            raise ConfigError(
                f"{place} '{old}' is the old name of '{new}', which is there too; remove '{old}'"
            )
        if warn:
            log.warning(
                "%s '%s' is called '%s' now; the old name is read for one version more", place, old, new
            )
        document = _renamed(document, tuple(block_path), old_key, new_key)
    return document


def lift_license(document: _yaml.Document) -> _yaml.Document:
    """Moves `models: {license: permissive}` to the file's own key `license`.

    A model of that name is left where it is: what it is called by is a path, and no list or policy.

    Args:
        document: A search file as read.

    Returns:
        The document with the key at the top, at its own place.

    Raises:
        ConfigError: The key is there in both places.
    """
    models = _block(document.data, ["models"])
    value = None if models is None else models.get("license")
    if models is None or not (value in _POLICIES or isinstance(value, list)):
        return document
    if "license" in document.data:
        raise ConfigError(
            f"{document.where(('models', 'license'))} 'license' is there twice, under models and at the top; "
            "remove one"
        )
    rest = {name: model for name, model in models.items() if name != "license"}
    marks = {path: place for path, place in document.marks.items() if path[:2] != ("models", "license")}
    for path, place in document.marks.items():
        if path[:2] == ("models", "license"):
            marks[path[1:]] = place
    return replace(document, data={**document.data, "models": rest, "license": value}, marks=marks)


def _block(data: Any, path: list[str]) -> dict[str, Any] | None:
    """The mapping at a path, None where there is none."""
    for key in path:
        if not isinstance(data, dict):
            return None
        data = data.get(key)
    return data if isinstance(data, dict) else None


def _renamed(document: _yaml.Document, block: tuple[str, ...], old_key: str, new_key: str) -> _yaml.Document:
    """The document with a key of a block renamed, in its data and in the places of its keys."""
    old_path, new_path = (*block, old_key), (*block, new_key)

    def data_below(data: dict[str, Any], depth: int) -> dict[str, Any]:
        if depth == len(block):
            return {new_key if key == old_key else key: value for key, value in data.items()}
        return {**data, block[depth]: data_below(data[block[depth]], depth + 1)}

    marks = {}
    for path, place in document.marks.items():
        is_renamed = path[: len(old_path)] == old_path
        marks[(*new_path, *path[len(old_path) :]) if is_renamed else path] = place
    return replace(document, data=data_below(document.data, 0), marks=marks)
