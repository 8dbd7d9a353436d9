"""What a YAML file is that was given for another: a recipe, a search file, one of mergekit's other tools'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

FileKind = Literal["recipe", "search file", "evolve", "moe"]

_ADVICE: dict[FileKind, str] = {
    "recipe": "is a mergekit recipe, not a search file: evomerge merge FILE OUT merges it; to search its "
    "weights, write a search file with its models, its base and its merge_method as method",
    "search file": "is a search file, not a mergekit recipe: evomerge run FILE searches, and evomerge merge "
    "takes the recipe.yaml of what it exports",
    "evolve": "is a mergekit-evolve file (genome), which is not read; write a search file for evomerge run: "
    "study: a name; genome.models and base_model as models: {name: path}, with the base's name as base; "
    "genome.merge_method as method; layer_granularity: n as space: {groups: number of layers / n}; each task "
    "as {task: name, weight, metric}, 'acc,none' as metric: acc; limit as evaluation: {items}. "
    "See 'From mergekit-evolve' in docs/search-file.md",
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
