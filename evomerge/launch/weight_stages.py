"""Stages that search weights: of a merge, or of the hops of a route."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.config import Config
from evomerge.config.schema import StageConfig
from evomerge.launch import pool
from evomerge.optimizers import OPTIMIZERS, Optimizer, OptimizerSettings, is_diagonal
from evomerge.search import Opening, Start
from evomerge.search.plan import ISLAND_SEED_STEP, STAGE_SEED_STEP
from evomerge.spaces import RouteWeightSpace, WeightSpace


def open_weight_stage(
    settings: Config, stage: StageConfig, space: WeightSpace, diagonal: bool, num_workers: int
) -> Callable[[Start], Opening]:
    make = _optimizer(settings, stage, diagonal, 0, num_workers)
    return lambda start: Opening(space, make, at_best=settings.search.start == "best")


def open_weight_stage_on_route(
    settings: Config, stage: StageConfig, begun: int, num_workers: int
) -> Callable[[Start], Opening]:
    def opened(start: Start) -> Opening:
        groups = settings.space.groups
        space = RouteWeightSpace(
            start.recipe, settings.base, settings.parents, groups if isinstance(groups, int) else len(groups)
        )
        diagonal = is_diagonal(settings.search.diagonal, begun, len(space.axes))
        return Opening(space, _optimizer(settings, stage, diagonal, 2, num_workers))

    return opened


def _optimizer(
    settings: Config, stage: StageConfig, diagonal: bool, number: int, num_workers: int
) -> Callable[[Sequence[float], int], Optimizer]:
    """Makes the optimizer of a stage from its start and the number of its island. number: of the stage, in the seed."""
    search = settings.search
    if search.diagonal is not None:
        diagonal = search.diagonal

    def make(start: Sequence[float], island: int) -> Optimizer:
        optimizer_settings = OptimizerSettings(
            sigma=stage.sigma or search.sigma,
            population=stage.population or pool.population(settings, num_workers, len(start)),
            seed=search.seed + STAGE_SEED_STEP * number + ISLAND_SEED_STEP * island,
            diagonal=diagonal,
        )
        return OPTIMIZERS[search.optimizer].make(start, optimizer_settings)

    return make
