"""Stages that search weights: those of a merge, or after routes those of the best route's hops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from evomerge.launch.hand_recipes import start_genome
from evomerge.launch.stage_request import StageRequest
from evomerge.optimizers import OPTIMIZERS, OptimizerSettings, is_diagonal, optimizer_for
from evomerge.search import Opening, Start
from evomerge.spaces import MethodChoiceSpace, RouteWeightSpace


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
    space, settings, search = request.space, request.settings, request.settings.search
    chosen = _settings(request, request.diagonal)
    entry = optimizer_for(search.optimizer, categorical=isinstance(space, MethodChoiceSpace))
    if isinstance(space, MethodChoiceSpace):
        chosen = replace(chosen, categories=space.categories, keep_probability=space.keep_probability)
    make = request.optimizers(entry, chosen)
    if search.start in settings.hand_recipes:
        genome = start_genome(search.start, space, settings, request.parents)
        return lambda start: Opening(space, make, begin=genome)
    at_best = search.start == "best"
    return lambda start: Opening(space, make, at_best=at_best)


def _of_route(request: StageRequest) -> Callable[[Start], Opening]:
    settings, groups = request.settings, request.settings.space.groups
    num_groups = groups if isinstance(groups, int) else len(groups)

    def open_from(start: Start) -> Opening:
        space = RouteWeightSpace(start.recipe, settings.base, settings.parents, num_groups)
        diagonal = is_diagonal(settings.search.diagonal, request.evaluations, len(space.axes))
        entry = OPTIMIZERS[settings.search.optimizer]
        return Opening(space, request.optimizers(entry, _settings(request, diagonal)))

    return open_from


def _settings(request: StageRequest, diagonal: bool) -> OptimizerSettings:
    """diagonal: where the search file does not say."""
    search = request.settings.search
    if search.diagonal is not None:
        diagonal = search.diagonal
    return OptimizerSettings(sigma=request.stage.sigma or search.sigma, diagonal=diagonal)
