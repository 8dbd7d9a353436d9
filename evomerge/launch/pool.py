"""Configuration -> where candidates run: the pool, how many searches share it, what it may use up, what earlier studies know."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.config import Config
from evomerge.errors import SetupError
from evomerge.optimizers import default_population
from evomerge.search.dispatch import Budget, Dispatch
from evomerge.search.reuse import Earlier, KnownPool
from evomerge.store import Store, StudyFacts, paths
from evomerge.workers import POOLS, DescribesWorkers, Limits, Pool, PoolSettings, Scorer

log = logging.getLogger(__name__)
_PER_WORKER = 4  # candidates of all islands together, for each worker, that keep it busy


def num_workers(settings: Config, workers: int) -> int:
    """How many workers a search begins with, as far as its settings say: what 'auto' is chosen by, and a fact of the study."""
    return settings.cluster.workers or (1 if settings.cluster.ray else workers)


def islands(settings: Config, num_workers: int) -> int:
    """How many searches share the workers. 'auto': one for a worker alone, two up to eight, four up to 64, else eight."""
    asked = settings.search.islands
    return (
        asked
        if asked != "auto"
        else 1
        if num_workers == 1
        else 2
        if num_workers <= 8
        else 4
        if num_workers <= 64
        else 8
    )


def population(settings: Config, num_workers: int, genes: int) -> int | None:
    """Candidates of a generation; None for the optimizer's own choice, which 'auto' never goes below."""
    asked = settings.search.population
    if asked != "auto":
        return asked
    return max(
        default_population(genes),
        math.ceil(_PER_WORKER * num_workers / islands(settings, num_workers)),
    )


def open_pool(
    settings: Config,
    scorer: Scorer,
    make: Callable[[], Scorer] | None,
    workers: int,
    facts: StudyFacts,
    earlier: Sequence[Path],
    said: Callable[[str], None],
) -> Pool:
    """The pool that a search asks for. make: opens a worker in another process; None where only `scorer`, of this one, will do.

    facts: of the study; earlier: stores that are asked first; said: is told where workers are placed.
    Raises SetupError where ray is asked for and not installed, or the cluster cannot give what is asked.
    """
    cluster, limits = settings.cluster, settings.cluster.limits
    on_ray = cluster.ray is not None and make is not None
    pool_settings = PoolSettings(
        scorer,
        make,
        workers=cluster.workers if on_ray else workers,
        address=cluster.ray,
        cpus=cluster.cpus,
        gpus=cluster.gpus,
        limits=Limits(factor=limits.factor, floor=limits.floor, memory=limits.memory),
    )
    if on_ray:
        pool = _ray_pool(pool_settings)
    elif workers > 1 and make is not None:
        pool = POOLS["processes"].open(pool_settings)
    else:
        pool = POOLS["in-process"].open(pool_settings)
    if isinstance(pool, DescribesWorkers):
        said(pool.describe())
    if earlier:
        known = Earlier(earlier, facts)
        for why in known.refused:
            log.warning(why)
        return KnownPool(pool, known)
    return pool


def earlier(settings: Config, studies: Path) -> list[Path]:
    """The stores of the studies that are to be reused, by path or name; studies: folder of those with a name. Raises StudyError."""
    return [Path(r) if Path(r).is_file() else paths.store_path(r, studies) for r in settings.reuse]


def dispatch(settings: Config, store: Store, pool: Pool) -> Dispatch:
    """What stands between the loop and the pool, with the grace and the budgets of the settings."""
    asked = settings.budget
    budget = Budget(asked.hours, asked.gpu_hours, asked.cost, asked.price, settings.cluster.gpus or 1.0)
    return Dispatch(pool, store, grace=settings.cluster.grace, budget=budget, backup=settings.cluster.backup)


def _ray_pool(pool_settings: PoolSettings) -> Pool:
    try:
        open_on_ray = POOLS["ray"].load()
    except ImportError as error:
        raise SetupError(
            f"--ray needs Ray, which is not installed ({error}); pip install 'evomerge[ray]', "
            "or run with --workers"
        ) from None
    return open_on_ray(pool_settings)
