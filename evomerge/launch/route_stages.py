"""Stages that search routes: their space, their optimizer, and the hand-written routes they begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.launch.relaxed_routes import check_relaxable, make_relaxation
from evomerge.launch.route_stacks import read_stack
from evomerge.launch.stage_request import StageRequest
from evomerge.optimizers import OptimizerEntry, OptimizerSettings, is_diagonal, optimizer_for
from evomerge.recipes import Recipe
from evomerge.search import Opening, Start
from evomerge.spaces import Baseline
from evomerge.spaces.routes.hand_routes import hand_routes
from evomerge.spaces.routes.layer_indicators import LayerIndicatorSpace
from evomerge.spaces.routes.layer_pool import LayerPool
from evomerge.spaces.routes.position_choices import PositionChoiceSpace

MERGED = "merged"
"""What a route calls the best model of the stage before it, where that is no parent."""


def route_space(
    settings: Config, parents: Mapping[str, Parent], start: Start
) -> PositionChoiceSpace | LayerIndicatorSpace:
    """The space of routes, which begins at the path of one model through its own layers.

    Args:
        settings: The settings of the search.
        parents: Its models, open.
        start: What the stages before came to; where it is no parent, it is one of the models whose layers are
            used.

    Returns:
        The space that `routes.genome` names.
    """
    routes = settings.routes
    name = routes.start
    if name == "best":
        name = _outer_model(start.recipe) or MERGED
    models = [(n, parents[n].layout.num_layers) for n in (routes.models or settings.models)]
    stage = None
    if name == MERGED:
        stage = (MERGED, start.recipe)
        models = [(MERGED, len(start.recipe.layers)), *models]
    elif name not in dict(models):
        models = [(name, parents[name].layout.num_layers), *models]
    depth = dict(models)[name]
    bounds = routes.layers or (max(1, depth // 2), 2 * depth)
    pool = LayerPool(tuple(models), name, stage, bounds, routes.scale_range, settings.out_dtype)
    if routes.genome == "indicator":
        return LayerIndicatorSpace(pool, routes.scales, routes.expected_mutations, routes.repeats)
    return PositionChoiceSpace(
        pool,
        routes.scales,
        routes.expected_mutations,
        spans=routes.spans,
        categorical=routes.genome == "categorical",
        outer=routes.embeddings == "any",
    )


def open_route_stage(request: StageRequest) -> Callable[[Start], Opening]:
    """Opens a stage of routes.

    Args:
        request: The stage; unless it is the first, hand-written routes of the best model are scored before
        it.

    Returns:
        A function from what the stages before came to to the open stage.

    Raises:
        ConfigError: The stage is to be relaxed and a model's layers cannot be averaged with the others'.
    """
    settings, parents = request.settings, request.parents
    is_relaxed = request.stage.method == "relaxed"
    if is_relaxed:
        routes = settings.routes
        names = [*(routes.models or settings.models), *([routes.start] if routes.start != "best" else [])]
        check_relaxable(settings.base, names, parents, routes.layers)

    def open_from(start: Start) -> Opening:
        space = route_space(settings, parents, start)
        category_weights = None
        if isinstance(space, PositionChoiceSpace) and space.categories:
            category_weights = space.category_weights
        optimizer_settings = OptimizerSettings(
            sigma=request.stage.sigma or space.sigma,
            diagonal=is_diagonal(settings.search.diagonal, request.evaluations, len(space.axes)),
            categories=space.categories,
            keep_probability=space.keep_probability,
            category_weights=category_weights,
        )
        make = request.optimizers(route_optimizer(settings), optimizer_settings)
        hand = hand_baselines(settings, parents, start) if request.position else ()
        relaxation = None
        if is_relaxed:
            any_outer = settings.routes.embeddings == "any"
            relaxation = make_relaxation(
                request.stage, settings.base, parents, space.pool, any_outer=any_outer
            )
        return Opening(space, make, hand, at_best=True, late=0.0, relaxation=relaxation)

    return open_from


def route_optimizer(settings: Config) -> OptimizerEntry:
    """The optimizer of the stages that search routes.

    Args:
        settings: The settings of the search.

    Returns:
        The one that they name, else elitist for categories and CMA-ES for numbers.
    """
    categorical = settings.routes.genome == "categorical"
    name = settings.routes.optimizer or ("elitist" if categorical else "cma")
    return optimizer_for(name, categorical=categorical)


def hand_baselines(settings: Config, parents: Mapping[str, Parent], start: Start | None) -> list[Baseline]:
    """Routes that people write by hand, and the stacks that the search file names.

    Args:
        settings: The settings of the search.
        parents: Its models, open.
        start: What the stages before came to: where it is no parent, the routes are of that model alone; None
            for a first
            stage, whose routes are of the parents.

    Returns:
        The recipes with their labels.

    Raises:
        ConfigError: If a stack is not there, or no stack of the search's layers passed through as they are.
    """
    names = settings.routes.models or tuple(settings.models)
    models = tuple((name, parents[name].layout.num_layers) for name in names)
    stage = None
    if start is not None and _outer_model(start.recipe) is None:
        stage = (MERGED, start.recipe)
        models = ((MERGED, len(start.recipe.layers)),)
    routes = hand_routes(models, stage=stage, out_dtype=settings.out_dtype)
    stacks = [(Path(file).name, read_stack(file, settings, parents)) for file in settings.routes.stacks]
    return [Baseline(label, "hand", recipe) for label, recipe in (*routes, *stacks)]


def _outer_model(recipe: Recipe) -> str | None:
    """The model that a stack of layers has the embeddings and the head of; None for a merge."""
    if recipe.stages or any(mix.method != "passthrough" for mix in recipe.mixes):
        return None
    names = {mix.sources[0][0] for mix in (recipe.embeddings, recipe.head)}
    return names.pop() if len(names) == 1 else None
