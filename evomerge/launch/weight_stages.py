"""Stages that search weights: those of a merge, or after routes those of the best route's hops."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.launch.hand_recipes import start_genome
from evomerge.launch.stage_request import StageRequest
from evomerge.optimizers import OPTIMIZERS, OptimizerEntry, OptimizerSettings, is_diagonal
from evomerge.search import Opening, Start
from evomerge.spaces import RouteWeightSpace


def open_weight_stage(request: StageRequest) -> Callable[[Start], Opening]:
    """Opens a stage of weights.

    Args:
        request: The stage; the first of a search searches its space of weights, a later one that of the route
        before it.

    Returns:
        A function from what the stages before came to to the open stage.
    """
    return _of_merge(request) if request.position == 0 else _of_route(request)


def _of_merge(request: StageRequest) -> Callable[[Start], Opening]:
    make = request.optimizers(_entry(request), _settings(request, request.diagonal))
    settings = request.settings
    if settings.search.start in settings.hand_recipes:
        genome = start_genome(settings.search.start, request.space, settings, request.parents)
        return lambda start: Opening(request.space, make, begin=genome)
    at_best = settings.search.start == "best"
    return lambda start: Opening(request.space, make, at_best=at_best)


def _of_route(request: StageRequest) -> Callable[[Start], Opening]:
    settings, groups = request.settings, request.settings.space.groups
    num_groups = groups if isinstance(groups, int) else len(groups)

    def open_from(start: Start) -> Opening:
        space = RouteWeightSpace(start.recipe, settings.base, settings.parents, num_groups)
        diagonal = is_diagonal(settings.search.diagonal, request.evaluations, len(space.axes))
        return Opening(space, request.optimizers(_entry(request), _settings(request, diagonal)))

    return open_from


def _entry(request: StageRequest) -> OptimizerEntry:
    return OPTIMIZERS[request.settings.search.optimizer]


def _settings(request: StageRequest, diagonal: bool) -> OptimizerSettings:
    """diagonal: where the search file does not say."""
    search = request.settings.search
    if search.diagonal is not None:
        diagonal = search.diagonal
    return OptimizerSettings(sigma=request.stage.sigma or search.sigma, diagonal=diagonal)
