"""Derivatives of a stored candidate's score by every coefficient, from one backward pass over its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge import reports
from evomerge.errors import StudyError, TaskError
from evomerge.evaluation import GradientRequest, Items, Objective, Slopes
from evomerge.evaluation.task_set import check_losses
from evomerge.launch.learned_spaces import GENOMES, genome_for, tensor_cells
from evomerge.launch.opening import Allowed, Opened, open_stored_search
from evomerge.launch.rescoring import OnProgress, ScanRequest, scan_items, silent
from evomerge.methods.task_vector_slopes import has_slopes
from evomerge.recipes import Recipe
from evomerge.reports import derivatives as report
from evomerge.reports import sensitivity as scanning
from evomerge.search.plan import DifferentiableSpace, RowSpace
from evomerge.spaces import MethodChoiceSpace, WeightSpace
from evomerge.spaces.base import NamedAxis
from evomerge.spaces.cell_weights import axis_derivatives
from evomerge.store import Store, Trial

_REMEDY = "scan them without --gradient"


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """A candidate in the space of its stage.

    recipe: its own, or of the space's nearest point. values: of each axis. pull: derivatives by coefficients
    of the merge -> those by axes; None where the method has none.
    """

    axes: Sequence[NamedAxis]
    recipe: Recipe
    genome: tuple[float, ...]
    values: tuple[float, ...]
    pull: Callable[[Mapping[tuple[str, str, str], float]], Sequence[float | None]]


def differentiate(
    store: Store,
    reference: str,
    request: ScanRequest,
    *,
    allowed: Allowed | None = None,
    show: OnProgress = silent,
) -> dict[str, Any]:
    """Takes the derivatives by a candidate's coefficients, all at once; nothing is stored.

    Args:
        store: Of the study.
        reference: The candidate: its number, 'best', or the label of a parent or hand recipe.
        request: Which coefficients and items; where the scan that it names is stored, its slopes are shown
            too.
        allowed: What the tasks may do.
        show: Called with (done, total) of the shards of items.

    Returns:
        Plain data: for each axis its derivative with its standard error.

    Raises:
        StudyError: The candidate is of routes, its method has no known derivatives, a task has no loss, or
            models or tasks have changed.
    """
    trial = reports.resolve(store, reference)
    opened = open_stored_search(store, allowed)
    found = _coefficients(opened, trial, store.recipe(trial.recipe_id))
    chosen = scanning.matching_axes(found.axes, request.pattern)
    try:
        check_losses(opened.harness)
    except TaskError as error:
        raise StudyError(f"{error}; {_REMEDY}") from error
    items = scan_items(opened, request)
    parts = _slopes(opened, found.recipe, items, show)
    by_shard = [found.pull(part.partials) for part in parts]
    scanned = _scanned(store, opened, found, request, items) if trial.stage == 0 else {}
    rows = []
    for place in chosen:
        name = found.axes[place].name
        own = [slopes[place] for slopes in by_shard]
        known = [-slope for slope in own if slope is not None]  # of the loss, which falls as the score rises
        slope = report.estimate(known) if known else None
        rows.append(report.Derivative(name, found.values[place], slope, scanned.get(name)))
    return {
        "study": opened.settings.study,
        "candidate": trial.id,
        "recipe": found.recipe.id,
        "role": request.role,
        "items": sum(map(len, items.values())),
        "shards": len(parts),
        "loss": sum(part.loss for part in parts),
        "notes": _notes(trial, found),
        "axes": [row.to_plain() for row in rows],
    }


def _coefficients(opened: Opened, trial: Trial, recipe: Recipe) -> _Coefficients:
    """The coefficients of a candidate; raises StudyError where there are none with derivatives."""
    kind, stage = opened.settings.kinds[trial.stage], opened.settings.stages[trial.stage]
    if kind == "routes" or (kind == "weights" and trial.stage):
        raise StudyError(
            f"candidate {trial.id} is a route or came after one: derivatives are of merges of whole models; "
            "choose a candidate of a first stage of weights or of a learned one"
        )
    space = opened.space
    if isinstance(space, MethodChoiceSpace):
        raise StudyError(
            f"the search chose among {', '.join(space.methods)} for each layer group, and derivatives are of "
            f"the coefficients of one method; {_REMEDY}"
        )
    if not has_slopes(space.method):
        raise StudyError(
            f"'{space.method.name}' is no sum of task vectors with weights, so its coefficients have no "
            f"known derivative; {_REMEDY}"
        )
    if kind == "weights":
        return _of_weights(opened, space, trial, recipe)
    fewest = min(map(len, opened.harness.items("search").values()))
    learned = GENOMES[stage.genome or genome_for(fewest)].make(space, opened.parents)
    if isinstance(learned, RowSpace):
        raise StudyError(
            f"candidate {trial.id} has a weight for each row of its tensors, too many to be listed; choose a "
            "candidate of another genome"
        )
    return _of_learned(learned, trial, recipe)


def _of_weights(opened: Opened, space: WeightSpace, trial: Trial, recipe: Recipe) -> _Coefficients:
    genome = scanning.genome_of(space, recipe, trial.genome)
    values = tuple(axis.value(gene) for axis, gene in zip(space.axes, genome, strict=True))
    cells = tensor_cells(space, opened.parents[space.base])

    def pull(partials: Mapping[tuple[str, str, str], float]) -> Sequence[float | None]:
        return axis_derivatives(space, cells, partials)

    return _Coefficients(space.axes, space.decode(genome), genome, values, pull)


def _of_learned(space: DifferentiableSpace, trial: Trial, recipe: Recipe) -> _Coefficients:
    genome = trial.genome if trial.genome is not None else space.encode(recipe)
    if genome is None:
        raise StudyError(
            f"recipe {recipe.id} is no point of the space of its stage, so it has no coefficients there; "
            "choose a candidate of the learned stage"
        )
    return _Coefficients(space.axes, space.decode(genome), tuple(genome), tuple(genome), space.pull)


def _slopes(opened: Opened, recipe: Recipe, items: Items, show: OnProgress) -> list[Slopes]:
    """The slopes of each shard of items. Raises StudyError where one cannot be had."""
    worker = opened.load()
    shares = Objective(opened.objective.terms).shares()
    request = GradientRequest(report.shard_weights(items, shares), "probability")
    parts = report.shards(items)
    found: list[Slopes] = []
    for done, part in enumerate(parts, 1):
        evaluation = worker.slopes(recipe, part, request)
        if evaluation.slopes is None:
            raise StudyError(f"the candidate has no derivatives: {evaluation.error}")
        found.append(evaluation.slopes)
        show(done, len(parts))
    return found


def _scanned(
    store: Store, opened: Opened, found: _Coefficients, request: ScanRequest, items: Items
) -> dict[str, Any]:
    """Axis -> slope of its scan, where every point of it is stored."""
    space = opened.space
    if opened.settings.kinds[0] != "weights":
        return {}
    stored = store.sensitivity(found.recipe.id, request.role, items)
    if (scanning.CENTRE, 0.0) not in stored:
        return {}
    places = range(len(space.axes))
    points = scanning.points(space, found.genome, places, request.step, request.span)
    missing = {point.axis for point in points if (point.axis, point.value) not in stored}
    points = [point for point in points if point.axis not in missing]
    shares = Objective(opened.objective.terms).shares()
    curves = scanning.curves(space, found.genome, points, stored, shares)
    return {curve.axis: curve.slope for curve in curves}


def _notes(trial: Trial, found: _Coefficients) -> list[str]:
    if found.recipe.id == trial.recipe_id:
        return []
    centre = found.recipe.id
    return [f"recipe {trial.recipe_id} is no point of the space; derivatives are of {centre}, its nearest"]
