"""Configuration -> where candidates run: the pool, the islands that share it, budgets, reused studies."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.config import Config
from evomerge.errors import SetupError
from evomerge.launch.opening import device_name
from evomerge.optimizers import default_population
from evomerge.search.dispatch import Budget, Dispatch
from evomerge.search.reuse import Earlier, KnownPool
from evomerge.store import Store, StudyFacts, paths
from evomerge.workers import POOLS, DescribesWorkers, Limits, Pool, PoolSettings, Scorer
from evomerge.workers.process_devices import visible_devices

log = logging.getLogger(__name__)
_ISLANDS = ((1, 1), (8, 2), (64, 4))  # (at most so many workers, islands)
_MOST_ISLANDS = 8
_ROUNDING = 1e-9  # of shares of a card
_PER_WORKER = 4  # candidates of all islands together, for each worker, that keep it busy


def num_workers(settings: Config, workers: int) -> int:
    """How many workers a search begins with: what 'auto' is chosen by, and a fact of the study.

    Args:
        settings: The settings of the search.
        workers: Processes of this machine.

    Returns:
        The number, as far as the settings say; on Ray without one in the settings it is 1.
    """
    return settings.cluster.workers or (1 if settings.cluster.ray else workers)


def islands(settings: Config, num_workers: int) -> int:
    """How many searches share the workers.

    Args:
        settings: The settings of the search.
        num_workers: Workers that the study began with.

    Returns:
        What the settings say; 'auto' is one for a worker alone, two up to eight, four up to 64, else eight.
    """
    requested = settings.search.islands
    if requested != "auto":
        return requested
    for most, count in _ISLANDS:
        if num_workers <= most:
            return count
    return _MOST_ISLANDS


def population(settings: Config, num_workers: int, genes: int) -> int | None:
    """How many candidates a generation of each island has.

    Args:
        settings: The settings of the search.
        num_workers: Workers that the study began with.
        genes: Length of a genome.

    Returns:
        What the settings say, None for the optimizer's own choice; 'auto' is at least that, and keeps the
        workers busy.
    """
    requested = settings.search.population
    if requested != "auto":
        return requested
    busy = math.ceil(_PER_WORKER * num_workers / islands(settings, num_workers))
    return max(default_population(genes), busy)


def is_elsewhere(settings: Config, workers: int) -> bool:
    """Whether candidates are evaluated in other processes than this one.

    Args:
        settings: The settings of the search, which may name a Ray cluster.
        workers: Processes of this machine, without Ray.

    Returns:
        True where they are, unless something else than the tasks scores them: then only this process can.
    """
    return settings.cluster.ray is not None or workers > 1


def open_pool(
    settings: Config,
    scorer: Scorer,
    make: Callable[[], Scorer] | None,
    workers: int,
    show: Callable[[str], None],
) -> Pool:
    """Opens the pool of workers that a search runs in.

    Args:
        settings: The settings of the search, which may name a Ray cluster.
        scorer: The worker of this process.
        make: Opens a worker in another process; None where only `scorer` will do.
        workers: Processes of this machine, without Ray.
        show: Called with a line that says where workers are placed.

    Returns:
        The pool; the caller closes it.

    Raises:
        SetupError: If Ray is requested and not installed, or the cluster cannot give what is requested.
    """
    cluster, limits = settings.cluster, settings.cluster.limits
    on_ray = cluster.ray is not None and make is not None
    devices = grouped(process_devices(), cluster.gpus) if workers > 1 and not on_ray else ()
    pool_settings = PoolSettings(
        scorer,
        make,
        workers=cluster.workers if on_ray else workers,
        address=cluster.ray,
        cpus=cluster.cpus,
        gpus=cluster.gpus,
        limits=Limits(factor=limits.factor, floor=limits.floor, opening=limits.opening, memory=limits.memory),
        devices=devices,
    )
    if on_ray:
        pool = _ray_pool(pool_settings)
    elif workers > 1 and make is not None:
        if devices:
            show(f"{workers} workers, each on GPU {' or '.join(devices)}")
            if mixed := several_kinds(min(workers, len(devices)) * max(1, int(cluster.gpus or 1))):
                log.warning(mixed)
        pool = POOLS["processes"].open(pool_settings)
    else:
        pool = POOLS["in-process"].open(pool_settings)
    if isinstance(pool, DescribesWorkers):
        show(pool.describe())
    return pool


def grouped(devices: Sequence[str], gpus: float | None) -> tuple[str, ...]:
    """The cards of each process, where one has several.

    Args:
        devices: Names of the cards.
        gpus: Cards of a process; one unless that is more than 1.

    Returns:
        Names joined by commas, as `CUDA_VISIBLE_DEVICES` has them; cards that are left over are not used.

    Raises:
        SetupError: There are fewer cards than a process needs.
    """
    count = max(1, int(gpus or 1))
    if devices and len(devices) < count:
        raise SetupError(f"a worker is to have {count} GPUs, and this machine has {len(devices)}")
    return tuple(",".join(devices[i : i + count]) for i in range(0, len(devices) - count + 1, count))


def workers_of_a_card(settings: Config, workers: int) -> int:
    """How many workers share a card.

    Args:
        settings: The settings of the search.
        workers: Processes of this machine, without Ray.

    Returns:
        As many as `cluster.gpus` lets, or as there are processes for each card of this machine.
    """
    gpus = settings.cluster.gpus
    by_share = int(1 / gpus + _ROUNDING) if gpus and gpus < 1 else 1
    if settings.cluster.ray is not None or workers <= 1:
        return by_share
    cards = grouped(process_devices(), gpus)
    return math.ceil(workers / len(cards)) if cards else 1


def process_devices() -> tuple[str, ...]:
    """The cards that processes of this machine share.

    Returns:
        Their names, as `CUDA_VISIBLE_DEVICES` has them. None where candidates are evaluated on the CPU, or
        `$EVOMERGE_DEVICE` names one card: that is then everybody's.
    """
    import torch

    return visible_devices(os.environ, torch.cuda.device_count()) if device_name() == "cuda" else ()


def several_kinds(count: int) -> str:
    """What a user should know of cards that are not of one kind.

    Args:
        count: How many cards of this machine are used.

    Returns:
        A sentence; empty where they are of one kind.
    """
    from evomerge.workers.device import card

    kinds = sorted({card(f"cuda:{number}")["card"] for number in range(count)})
    if len(kinds) < 2:
        return ""
    return (
        f"these GPUs are of several kinds: {', '.join(kinds)}; a score's last digits depend on which of them "
        "computes it. Name those of one kind in CUDA_VISIBLE_DEVICES"
    )


def reuse(pool: Pool, earlier: Sequence[Path], facts: StudyFacts) -> Pool:
    """A pool that reads evaluations of earlier studies before it makes them again.

    Args:
        pool: Makes what they do not hold.
        earlier: Their stores.
        facts: Of this study; those that differ in what scores depend on are refused, which is logged.

    Returns:
        `pool` itself where there are none.
    """
    if not earlier:
        return pool
    cache = Earlier(earlier, facts)
    for reason in cache.refused:
        log.warning(reason)
    return KnownPool(pool, cache)


def earlier(settings: Config, studies: Path) -> list[Path]:
    """The stores of the studies whose evaluations are to be reused.

    Args:
        settings: The settings of the search, which name them by path or name.
        studies: Folder of those with a name.

    Returns:
        Their paths.

    Raises:
        StudyError: If one is not there.
    """
    return [Path(r) if Path(r).is_file() else paths.store_path(r, studies) for r in settings.reuse]


def dispatch(settings: Config, store: Store, pool: Pool) -> Dispatch:
    """What stands between the search's loop and its pool.

    Args:
        settings: The settings of the search: grace, budgets and backups.
        store: Of the study.
        pool: Of its workers.

    Returns:
        The dispatch.
    """
    limits = settings.budget
    gpus = settings.cluster.gpus or 1.0
    budget = Budget(limits.hours, limits.gpu_hours, limits.cost, limits.price, gpus)
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
