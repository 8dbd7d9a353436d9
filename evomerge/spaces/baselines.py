"""What a search has to beat: every parent as it is, and the recipes people write by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from evomerge.methods import method
from evomerge.recipes import Recipe
from evomerge.spaces.weights import WeightSpace


@dataclass(frozen=True, slots=True)
class Baseline:
    """A recipe scored before the search.

    Attributes:
        label: What it is called in tables.
        origin: 'parent' for a model as it is, 'hand' for a recipe written by hand.
        recipe: What is scored.
    """

    label: str
    origin: Literal["parent", "hand"]
    recipe: Recipe


def baselines(space: WeightSpace) -> list[Baseline]:
    """Parents first, then hand recipes over all models of a space: the same for every search method.

    Args:
        space: Its layers, base and models are used; its method and ranges are not.

    Returns:
        Parents as they are (the base first), uniform average, task arithmetic, TIES, DARE-TIES, SLERP for two
        models, each model's task vector alone, and pairs of task vectors for three or four models.
    """
    return [*_parents(space), *_hand(space)]


def soup(space: WeightSpace, names: Sequence[str]) -> Baseline:
    """The plain average of some of a space's models.

    Args:
        space: Its layers are used.
        names: Models, the base among them or not.

    Returns:
        A hand recipe.
    """
    average = _with(space, "linear", tuple(names)).uniform({"weight": 1.0})
    return Baseline(f"soup of {' + '.join(names)}", "hand", average)


def _parents(space: WeightSpace) -> Iterator[Baseline]:
    for name in (space.base, *_experts(space)):
        yield Baseline(name, "parent", _with(space, "passthrough", (name,)).uniform({}))


def _experts(space: WeightSpace) -> tuple[str, ...]:
    """The models besides the base, which may be one of those that a space merges."""
    return tuple(name for name in space.models if name != space.base)


def _hand(space: WeightSpace) -> Iterator[Baseline]:
    models = _experts(space)
    average = _with(space, "linear", (space.base, *models)).uniform({"weight": 1.0})
    yield Baseline("uniform average", "hand", average)
    sums = _with(space, "task_arithmetic", models)
    for weight in (0.3, 0.5, 0.7, 1.0):
        yield Baseline(f"task arithmetic {weight:g}", "hand", sums.uniform({"weight": weight}))
    ties = _with(space, "ties", models)
    yield Baseline("TIES .5, normalized", "hand", ties.uniform({"weight": 1.0, "density": 0.5}))
    summed = {"weight": 1.0, "density": 0.5, "normalize": 0.0}
    yield Baseline("TIES .5, sum", "hand", ties.uniform(summed))
    for weight in (0.5, 1.0):
        recipe = _with(space, "dare_ties", models).uniform({"weight": weight, "density": 0.5})
        yield Baseline(f"DARE-TIES .5, weight {weight:g}", "hand", recipe)
    if len(models) == 1:
        yield Baseline("SLERP .5", "hand", _with(space, "slerp", models).uniform({"t": 0.5}))
    for name in models:
        for weight in (0.5, 1.3):
            alone = {m: weight if m == name else 0.0 for m in models}
            yield Baseline(f"{name} alone at {weight:g}", "hand", sums.uniform({"weight": alone}))
    if 2 < len(models) <= 4:
        for pair in combinations(models, 2):
            both = {m: float(m in pair) for m in models}
            yield Baseline(f"{' + '.join(pair)} at 1", "hand", sums.uniform({"weight": both}))


def _with(space: WeightSpace, name: str, models: tuple[str, ...]) -> WeightSpace:
    """The space's layers under another method and other models, nothing fixed."""
    return replace(space, method=method(name), models=models, ranges={}, dead=frozenset(), searchable=False)
