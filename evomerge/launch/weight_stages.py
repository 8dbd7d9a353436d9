"""Stages that search weights: of a merge, or of the hops of a route."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.config import Config
from evomerge.config.schema import StageConfig
from evomerge.launch import pool
from evomerge.optimizers import Optimizer
from evomerge.optimizers.cma_es import CmaEs
from evomerge.search import Opening, Start
from evomerge.search.plan import ISLAND_SEED_STEP, STAGE_SEED_STEP
from evomerge.spaces import RouteWeightSpace, WeightSpace


def open_weight_stage(
    settings: Config, stage: StageConfig, space: WeightSpace, diagonal: bool, num_workers: int
) -> Callable[[Start], Opening]:
    sigma, at_best = settings.search.sigma, settings.search.start == "best"
    return lambda start: Opening(
        space, _cma(settings, stage, sigma, diagonal, 0, num_workers), at_best=at_best
    )


def open_weight_stage_on_route(
    settings: Config, stage: StageConfig, begun: int, num_workers: int
) -> Callable[[Start], Opening]:
    def opened(start: Start) -> Opening:
        groups = settings.space.groups
        space = RouteWeightSpace(
            start.recipe, settings.base, settings.parents, groups if isinstance(groups, int) else len(groups)
        )
        return Opening(
            space, _cma(settings, stage, settings.search.sigma, begun < 20 * len(space.axes), 2, num_workers)
        )

    return opened


def _cma(
    settings: Config, stage: StageConfig, sigma: float, diagonal: bool, number: int, num_workers: int
) -> Callable[[Sequence[float], int], Optimizer]:
    search = settings.search
    learns = search.diagonal if search.diagonal is not None else diagonal

    def optimizer(start: Sequence[float], island: int) -> Optimizer:
        size = stage.population or pool.population(settings, num_workers, len(start))
        seed = search.seed + STAGE_SEED_STEP * number + ISLAND_SEED_STEP * island
        return CmaEs(start, stage.sigma or sigma, population=size, diagonal=learns, seed=seed)

    return optimizer
