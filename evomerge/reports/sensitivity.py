"""How a candidate answers to each of its coefficients: one axis of the space is moved in steps, all others are kept.

Knows nothing of models: what scores a recipe is passed in, what has been scored is in the study's file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, StudyError, suggest
from evomerge.evaluation import Evaluation, Items, ItemScore, Role
from evomerge.evaluation.estimates import Estimate, holm, paired, stratified
from evomerge.recipes import Recipe
from evomerge.store import NewEvaluation, NewSensitivity, Scored, Store

if TYPE_CHECKING:
    from evomerge.spaces import Axis, WeightSpace


CENTRE = ""  # the name that the candidate itself is stored under, where a point has its axis
STEEP = 0.05  # an axis is steep where the likeliest of its steps to differ has a smaller p-value, corrected for their number
_MOST = 100  # steps to a side


@dataclass(frozen=True, slots=True)
class Point:
    """The candidate with one coefficient changed. axis: its name; value: the coefficient, in the parameter's own units."""

    axis: str
    value: float
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Step:
    """A scored point of a curve. score: the objective, None where it failed, see `error`; difference: to the candidate,
    paired on items; p: two-sided p-value of it, corrected by Holm for the steps of its axis."""

    value: float
    score: float | None
    difference: Estimate | None
    p: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """The scores along one axis. value: the candidate's own; steps: by value, the candidate among them; best: value of the
    highest; slope: of the least-squares line through the weighted mean of the tasks, by unit of the parameter, with the
    error over items; steep: whether any step differs from the candidate by more than chance, see `STEEP`."""

    axis: str
    value: float
    steps: tuple[Step, ...]
    best: float
    slope: Estimate | None
    steep: bool


def genome_of(space: WeightSpace, recipe: Recipe, genome: Sequence[float] | None) -> tuple[float, ...]:
    """The candidate's genome, or that of the space's nearest recipe. Raises StudyError where the space holds none."""
    if genome is not None:
        return tuple(genome)
    found = space.encode(recipe)
    if found is None:
        raise StudyError(
            f"recipe {recipe.id} is no point of this space ({space.method.name} of {', '.join(space.models)}), so it has no coefficients to move; "
            "choose a candidate that the search sampled"
        )
    return found


def matching(axes: Sequence[Axis], pattern: str | None) -> list[int]:
    """Places of the axes whose name matches a pattern with * and ?, or holds it as a part; all for None."""
    names = [axis.name for axis in axes]
    found = [
        i
        for i, name in enumerate(names)
        if pattern is None or fnmatch.fnmatchcase(name, pattern) or pattern in name
    ]
    if not found:
        raise ConfigError(f"no axis of the space matches '{pattern}'. {suggest(pattern or '', names)}")
    return found


def points(
    space: WeightSpace, genome: Sequence[float], places: Sequence[int], step: float, span: float
) -> list[Point]:
    """The candidate's neighbours on the axes at `places`: value ± step, ± 2 step, … up to span, inside the axis' bounds.

    Values that the parameter's grid rounds to one another or to the candidate's are taken once.
    """
    if not (math.isfinite(step) and math.isfinite(span) and 0 < step <= span):
        raise ConfigError(f"a scan needs 0 < step <= span, got step {step:g} and span {span:g}")
    count = int(span / step + 1e-9)
    if count > _MOST:
        raise ConfigError(
            f"steps of {step:g} up to {span:g} are {count} to a side, at most {_MOST} are taken; choose larger steps"
        )
    own = space.decode(genome).id
    found: list[Point] = []
    for place in places:
        axis = space.axes[place]
        start, seen = axis.value(genome[place]), {own}
        for k in (k for k in range(-count, count + 1) if k):
            wanted = start + k * step
            if not axis.low <= wanted <= axis.high:
                continue
            gene = axis.gene(wanted)
            recipe = space.decode([*genome[:place], gene, *genome[place + 1 :]])
            if recipe.id not in seen:
                seen.add(recipe.id)
                found.append(Point(axis.name, axis.value(gene), recipe))
    if not found:
        raise ConfigError(
            f"no step of {step:g} stays inside the bounds of the chosen axes; choose a smaller one"
        )
    return found


def subset(pool: Items, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The same items of each task whenever it is asked: the first of a hash, as many as `sizes` says or as there are."""
    if few := [f"{task}: {size}" for task, size in sizes.items() if size < 2]:
        raise ConfigError(f"a scan needs at least 2 items of each task for an error, got {', '.join(few)}")

    def place(task: str, item: str) -> bytes:
        return hashlib.sha256(f"sensitivity/{task}/{item}".encode()).digest()

    return {
        task: tuple(sorted(ids, key=lambda item: place(task, item))[: sizes[task]])
        for task, ids in pool.items()
    }


def scan(
    store: Store,
    centre: Recipe,
    neighbours: Sequence[Point],
    role: Role,
    items: Items,
    evaluate: Callable[[Recipe, Items], Evaluation],
    score: Callable[[Evaluation], float | None],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Scores the candidate and its neighbours and stores each at once; returns how many were not stored yet.

    score: the objective of an evaluation, None where it has none. Raises StudyError if the candidate itself fails.
    """
    known = store.sensitivity(centre.id, role, items)
    todo = [p for p in (Point(CENTRE, 0.0, centre), *neighbours) if (p.axis, p.value) not in known]
    for done, point in enumerate(todo):
        evaluation = evaluate(point.recipe, items)
        if point.axis == CENTRE and evaluation.error is not None:
            raise StudyError(f"the candidate itself cannot be scored: {evaluation.error}")
        changed = NewEvaluation(point.recipe, role, items, evaluation, score(evaluation))
        store.add_sensitivity(NewSensitivity(centre, point.axis, point.value, changed))
        show(done + 1, len(todo))
    return len(todo)


def curves(
    space: WeightSpace,
    genome: Sequence[float],
    neighbours: Sequence[Point],
    known: Mapping[tuple[str, float], Scored],
    weights: Mapping[str, float],
) -> list[Curve]:
    """The curves of the axes of `neighbours`, in the order of the space, from what is stored.

    weights: task -> share in the weighted mean that differences and slopes are of, with the sign of its metric.
    """
    centre = known[CENTRE, 0.0]
    found = []
    for place, axis in enumerate(space.axes):
        values = sorted(p.value for p in neighbours if p.axis == axis.name)
        if values:
            found.append(
                _curve(
                    axis, axis.value(genome[place]), centre, {v: known[axis.name, v] for v in values}, weights
                )
            )
    return found


def as_data(curve: Curve) -> dict[str, Any]:
    """A curve as plain data."""
    steps = []
    for s in curve.steps:
        row: dict[str, Any] = {"value": s.value, "score": s.score}
        if s.difference is not None:
            row |= {"difference": s.difference.mean, "error": s.difference.error, "p": s.p}
        steps.append(row | ({"cause": s.error} if s.error else {}))
    slope = {} if curve.slope is None else {"slope": curve.slope.mean, "slope_error": curve.slope.error}
    return {
        "axis": curve.axis,
        "value": curve.value,
        "best": curve.best,
        **slope,
        "steep": curve.steep,
        "steps": steps,
    }


def _curve(
    axis: Axis, value: float, centre: Scored, around: Mapping[float, Scored], weights: Mapping[str, float]
) -> Curve:
    own = centre.evaluation.items
    scored = {v: s.evaluation.items for v, s in around.items() if s.evaluation.error is None}
    differences = {v: paired(items, own, weights) for v, items in scored.items()}
    corrected = (
        dict(zip(differences, holm([d.p_value() for d in differences.values()]), strict=True))
        if differences
        else {}
    )
    steps = [Step(value, centre.score, None, None)]
    steps += [
        Step(v, s.score, differences.get(v), corrected.get(v), s.evaluation.error) for v, s in around.items()
    ]
    steps.sort(key=lambda s: s.value)
    best = max(
        steps, key=lambda s: (-math.inf if s.score is None else round(s.score, 9), s.difference is None)
    )  # sums of the same differ by bits
    slope = stratified(_slopes({**scored, value: own}), weights) if scored else None
    return Curve(
        axis.name, value, tuple(steps), best.value, slope, any(p < STEEP for p in corrected.values())
    )


def _slopes(items: Mapping[float, Sequence[ItemScore]]) -> list[ItemScore]:
    """Of every item the slope of the least-squares line through its values: their mean is the slope of the mean."""
    values: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for x, scores in items.items():
        for s in scores:
            values[s.task, s.item].append((x, s.value))
    middle = math.fsum(items) / len(items)
    spread = math.fsum((x - middle) ** 2 for x in items)
    return [
        ItemScore(task, item, math.fsum((x - middle) * y for x, y in pairs) / spread)
        for (task, item), pairs in values.items()
    ]
