"""Sensitivity of a candidate to its coefficients: one axis of the space is moved in steps, others are kept.

Opens no model: what scores a recipe is passed in, what has been scored is in the study's file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from evomerge.errors import ConfigError, StudyError, suggest
from evomerge.evaluation import Evaluation, Items, ItemScore, Role
from evomerge.evaluation.estimates import Estimate, holm, paired, stratified
from evomerge.recipes import Recipe
from evomerge.store import NewEvaluation, NewSensitivity, Scored, Store

if TYPE_CHECKING:
    from evomerge.spaces import Axis, MergeSpace
    from evomerge.spaces.base import NamedAxis


CENTRE = ""
"""What the candidate itself is stored under, in place of the name of an axis."""
STEEP = 0.05
"""An axis is steep where the smallest p-value of its steps, corrected for their number, is below this."""
_MOST_STEPS = 100  # to each side


@dataclass(frozen=True, slots=True)
class Point:
    """The candidate with one coefficient changed.

    Attributes:
        axis: Name of the coefficient.
        value: What it is changed to, in the parameter's own units.
        recipe: The changed recipe.
    """

    axis: str
    value: float
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Scan:
    """What is scanned, and what it is scored on.

    Attributes:
        centre: The candidate's recipe.
        role: Role of the items.
        items: Task -> items.
    """

    centre: Recipe
    role: Role
    items: Items


@dataclass(frozen=True, slots=True)
class Step:
    """A scored point of a curve.

    Attributes:
        value: The coefficient.
        score: The objective, None where it failed, see `error`.
        difference: Difference to the candidate, paired on items, None for the candidate itself.
        p: Two-sided p-value of the difference, corrected by Holm for the steps of its axis.
        error: Why it failed, None where it did not.
    """

    value: float
    score: float | None
    difference: Estimate | None
    p: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """The scores along one axis.

    Attributes:
        axis: Name of the coefficient.
        value: The candidate's own value.
        steps: Scored points by value, the candidate among them.
        best: Value of the highest score.
        slope: Slope of the least-squares line through the weighted mean of the tasks, by unit of the
            parameter, with its error over items; None where no step could be scored.
        steep: Whether a step differs from the candidate by more than chance, see `STEEP`.
    """

    axis: str
    value: float
    steps: tuple[Step, ...]
    best: float
    slope: Estimate | None
    steep: bool


def genome_of(space: MergeSpace, recipe: Recipe, genome: Sequence[float] | None) -> tuple[float, ...]:
    """Finds the genome of a candidate.

    Args:
        space: The space of the search.
        recipe: The candidate's recipe.
        genome: Its stored genome, None where it came from none.

    Returns:
        The stored genome, or that of the space's nearest recipe.

    Raises:
        StudyError: The space holds no such recipe.
    """
    if genome is not None:
        return tuple(genome)
    nearest = space.encode(recipe)
    if nearest is None:
        raise StudyError(
            f"recipe {recipe.id} is no point of this space, so it has no coefficients to move; "
            "choose a candidate that the search sampled"
        )
    return nearest


def matching_axes(axes: Sequence[NamedAxis], pattern: str | None) -> list[int]:
    """Finds axes by name.

    Args:
        axes: Axes of a space.
        pattern: Part of the names, or a pattern with * and ?; None for all.

    Returns:
        Places of the axes that match.

    Raises:
        ConfigError: None matches.
    """
    names = [axis.name for axis in axes]
    if pattern is None:
        places = list(range(len(names)))
    else:
        places = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern) or pattern in name]
    if not places:
        raise ConfigError(f"no axis of the space matches '{pattern}'. {suggest(pattern or '', names)}")
    return places


def points(
    space: MergeSpace, genome: Sequence[float], places: Sequence[int], step: float, span: float
) -> list[Point]:
    """Makes the candidate's neighbours on some axes: value ± step, ± 2 step, … up to span.

    They lie inside the bounds of their axis. Values that the parameter's grid rounds to one another or to the
    candidate's are taken once.

    Args:
        space: The space of the search.
        genome: The candidate's genes, [axes].
        places: Which axes are moved, all of them numbers.
        step: Distance of neighbours, in the parameter's own units, above 0.
        span: Largest distance from the candidate, at least `step` and at most 100 steps.

    Returns:
        The neighbours, axis by axis.

    Raises:
        ConfigError: Step and span do not fit, or no step stays inside the bounds.
    """
    if not (math.isfinite(step) and math.isfinite(span) and 0 < step <= span):
        raise ConfigError(f"a scan needs 0 < step <= span, got step {step:g} and span {span:g}")
    count = int(span / step + 1e-9)
    if count > _MOST_STEPS:
        raise ConfigError(
            f"steps of {step:g} up to {span:g} are {count} to a side, at most {_MOST_STEPS} are taken; "
            "choose larger steps"
        )
    centre_id = space.decode(genome).id
    neighbours: list[Point] = []
    for place in places:
        axis = cast("Axis", space.axes[place])
        start = axis.value(genome[place])
        recipe_ids = {centre_id}
        for multiple in range(-count, count + 1):
            value = start + multiple * step
            if not multiple or not axis.low <= value <= axis.high:
                continue
            gene = axis.gene(value)
            recipe = space.decode([*genome[:place], gene, *genome[place + 1 :]])
            if recipe.id not in recipe_ids:
                recipe_ids.add(recipe.id)
                neighbours.append(Point(axis.name, axis.value(gene), recipe))
    if not neighbours:
        raise ConfigError(
            f"no step of {step:g} stays inside the bounds of the chosen axes; choose a smaller one"
        )
    return neighbours


def scan_items(pool: Items, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Chooses the items of a scan: always the same ones, the first by a hash.

    Args:
        pool: Task -> items to choose from.
        sizes: Task -> how many to choose, at least 2.

    Returns:
        Task -> chosen items, as many as there are where that is fewer.

    Raises:
        ConfigError: A size is below 2, so that there would be no error.
    """
    too_few = [f"{task}: {size}" for task, size in sizes.items() if size < 2]
    if too_few:
        raise ConfigError(
            f"a scan needs at least 2 items of each task for an error, got {', '.join(too_few)}"
        )

    def order(task: str, item: str) -> bytes:
        return hashlib.sha256(f"sensitivity/{task}/{item}".encode()).digest()

    chosen = {}
    for task, ids in pool.items():
        in_order = sorted(ids, key=lambda item: order(task, item))
        chosen[task] = tuple(in_order[: sizes[task]])
    return chosen


def scan(
    store: Store,
    what: Scan,
    neighbours: Sequence[Point],
    evaluate: Callable[[Recipe, Items], Evaluation],
    score: Callable[[Evaluation], float | None],
    show: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Scores the candidate and its neighbours, and stores each at once.

    What is stored already is not scored again.

    Args:
        store: The study, open for writing.
        what: The candidate and the items.
        neighbours: See `points`.
        evaluate: Evaluates a recipe on items.
        score: The objective of an evaluation, None where it has none.
        show: Called with the number of points that are done, and of all to do.

    Returns:
        How many points were scored.

    Raises:
        StudyError: The candidate itself cannot be scored.
    """
    stored = store.sensitivity(what.centre.id, what.role, what.items)
    all_points = (Point(CENTRE, 0.0, what.centre), *neighbours)
    todo = [point for point in all_points if (point.axis, point.value) not in stored]
    for done, point in enumerate(todo, start=1):
        evaluation = evaluate(point.recipe, what.items)
        if point.axis == CENTRE and evaluation.error is not None:
            raise StudyError(f"the candidate itself cannot be scored: {evaluation.error}")
        changed = NewEvaluation(point.recipe, what.role, what.items, evaluation, score(evaluation))
        store.add_sensitivity(NewSensitivity(what.centre, point.axis, point.value, changed))
        show(done, len(todo))
    return len(todo)


def curves(
    space: MergeSpace,
    genome: Sequence[float],
    neighbours: Sequence[Point],
    stored: Mapping[tuple[str, float], Scored],
    weights: Mapping[str, float],
) -> list[Curve]:
    """Makes curves of what is stored.

    Args:
        space: The space of the search.
        genome: The candidate's genes, [axes].
        neighbours: Points of the curves.
        stored: (axis, value) -> scores, of the candidate and all neighbours, see `Store.sensitivity`.
        weights: Task -> share in the weighted mean that differences and slopes are of, with the sign of its
            metric.

    Returns:
        A curve for each axis of the neighbours, in the order of the space.
    """
    centre = stored[CENTRE, 0.0]
    scanned = []
    for place, axis in enumerate(space.axes):
        values = sorted(point.value for point in neighbours if point.axis == axis.name)
        if values:
            axis = cast("Axis", axis)  # a choice of methods has no neighbours
            around = {value: stored[axis.name, value] for value in values}
            scanned.append(_curve(axis.name, axis.value(genome[place]), centre, around, weights))
    return scanned


def curve_data(curve: Curve) -> dict[str, Any]:
    """Writes a curve as plain data.

    Args:
        curve: A curve.

    Returns:
        Its attributes by name; a step has `difference`, `error` and `p`, or a `cause` where it failed.
    """
    steps = []
    for step in curve.steps:
        row: dict[str, Any] = {"value": step.value, "score": step.score}
        if step.difference is not None:
            row |= {"difference": step.difference.mean, "error": step.difference.error, "p": step.p}
        if step.error:
            row["cause"] = step.error
        steps.append(row)
    data: dict[str, Any] = {"axis": curve.axis, "value": curve.value, "best": curve.best}
    if curve.slope is not None:
        data |= {"slope": curve.slope.mean, "slope_error": curve.slope.error}
    return data | {"steep": curve.steep, "steps": steps}


def _curve(
    axis: str, value: float, centre: Scored, around: Mapping[float, Scored], weights: Mapping[str, float]
) -> Curve:
    centre_items = centre.evaluation.items
    items = {v: scored.evaluation.items for v, scored in around.items() if scored.evaluation.error is None}
    differences = {v: paired(scores, centre_items, weights) for v, scores in items.items()}
    corrected: dict[float, float] = {}
    if differences:
        p_values = holm([difference.p_value() for difference in differences.values()])
        corrected = dict(zip(differences, p_values, strict=True))
    steps = [Step(value, centre.score, None, None)]
    for v, scored in around.items():
        steps.append(Step(v, scored.score, differences.get(v), corrected.get(v), scored.evaluation.error))
    steps.sort(key=lambda step: step.value)
    slope = stratified(_slopes({**items, value: centre_items}), weights) if items else None
    steep = any(p < STEEP for p in corrected.values())
    return Curve(axis, value, tuple(steps), max(steps, key=_rank).value, slope, steep)


def _rank(step: Step) -> tuple[float, bool]:
    """Orders steps by score, rounded as sums of the same differ by bits; of equals the candidate is best."""
    score = -math.inf if step.score is None else round(step.score, 9)
    return score, step.difference is None


def _slopes(items: Mapping[float, Sequence[ItemScore]]) -> list[ItemScore]:
    """Least-squares slope of every item through its values: their mean is the slope of the mean."""
    values: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for x, scores in items.items():
        for score in scores:
            values[score.task, score.item].append((x, score.value))
    middle = math.fsum(items) / len(items)
    spread = math.fsum((x - middle) ** 2 for x in items)
    return [
        ItemScore(task, item, math.fsum((x - middle) * y for x, y in pairs) / spread)
        for (task, item), pairs in values.items()
    ]
