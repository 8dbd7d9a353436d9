"""What a YAML file is that was given for another: a recipe, a search file, one of mergekit's other tools'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

FileKind = Literal["recipe", "search file", "evolve", "moe"]

_ADVICE: dict[FileKind, str] = {
    "recipe": "is a mergekit recipe, not a search file: evomerge merge FILE OUT merges it; to search its "
    "weights, evomerge init --from-mergekit FILE writes a search file that begins at it and has it to beat",
    "search file": "is a search file, not a mergekit recipe: evomerge run FILE searches, and evomerge merge "
    "takes the recipe.yaml of what it exports",
    "evolve": "is a mergekit-evolve file (genome): evomerge init --from-mergekit-evolve FILE makes a search "
    "file of it and names what it cannot carry over",
    "moe": "is a mergekit-moe file (experts, a mixture of experts behind a router), which evomerge does not "
    "build: give it to mergekit-moe; its models may be merged before, each by a recipe",
}
"""Kind of file -> what is said of one that stands in another's place."""


def other_file(data: Any, wanted: FileKind) -> str | None:
    """A sentence about a file that is of another kind than the one asked for.

    Args:
        data: The parsed file.
        wanted: The kind asked for.

    Returns:
        What it is and what to do; None where it is of the kind, or of none that is known.
    """
    kind = _kind(data)
    return None if kind is None or kind == wanted else _ADVICE[kind]


def _kind(data: Any) -> FileKind | None:
    """The kind of a file by the keys that no other kind has."""
    if not isinstance(data, Mapping):
        return None
    if "study" in data:
        return "search file"
    if "merge_method" in data:
        return "recipe"
    if "genome" in data:
        return "evolve"
    return "moe" if "experts" in data or "gate_mode" in data else None
