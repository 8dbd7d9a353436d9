"""What a search needs of the cards' memory, planned before anything is loaded; also for cards elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.errors import ConfigError, SetupError
from evomerge.evaluation.lm_harness.backends import BACKENDS
from evomerge.evaluation.scoring_size import scoring_size
from evomerge.launch.opening import Opened, device_name, device_names
from evomerge.launch.pool import workers_of_a_card
from evomerge.merging.host_memory import available_memory
from evomerge.merging.memory_plan import (
    MemoryPlan,
    MemoryRequest,
    describe,
    fewest_cards,
    gigabytes,
    parent_size,
    plan_memory,
)
from evomerge.methods import method
from evomerge.methods.fused.magnitude_tables import GRID
from evomerge.workers.worker_memory import WorkerMemory

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DRIVER_SHARE = 0.99  # of a card's memory, sold by the GiB, that the driver shows
_MOST_CARDS = 1024
_ELSEWHERE = "the cards of the cluster are not known here; --cards 4x80GB plans for such"
_TABLE_ENTRY = 24  # bytes of a threshold, the last index at it and a norm


@dataclass(frozen=True, slots=True)
class Cards:
    """The cards that a search is planned for.

    Attributes:
        sizes: Bytes of each that may be planned with.
        host: Bytes of host memory that may be pinned; None where the cards are elsewhere.
        name: What they are called, such as '4 x 80 GB'.
    """

    sizes: tuple[int, ...]
    host: int | None
    name: str


def named_cards(text: str) -> Cards:
    """Reads which cards are meant, as they are sold.

    Args:
        text: Such as '4x80GB' or '141GB'. An '80 GB' card has 80 GiB, of which the driver shows 99 %.

    Returns:
        The cards.

    Raises:
        ConfigError: For anything else.
    """
    found = re.fullmatch(
        r"(?:([0-9]{1,4}) ?x ?)?([0-9]{1,4}(?:\.[0-9]{1,3})?) ?GB", text.strip(), re.IGNORECASE
    )
    count = int(found[1] or 1) if found else 0
    if found is None or not 1 <= count <= _MOST_CARDS or float(found[2]) <= 0:
        raise ConfigError(f"--cards is a number and a size such as 4x80GB, got '{text[:40]}'")
    size = int(float(found[2]) * 2**30 * _DRIVER_SHARE)
    return Cards((size,) * count, None, f"{count} x {found[2]} GB")


def cards_here() -> Cards | None:
    """The cards of this machine in their whole size; None where candidates are evaluated on the CPU."""
    import torch

    if not device_name().startswith("cuda"):
        return None
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    sizes = tuple(int(found.total_memory) for found in properties)
    return Cards(sizes, available_memory(), f"{len(sizes)} x {properties[0].name}")


def memory_request(settings: Config, parents: Mapping[str, Parent], card: int) -> MemoryRequest:
    """What a search needs of memory, from headers alone.

    Args:
        settings: The settings of the search.
        parents: Model name -> its files.
        card: Bytes of a card.

    Returns:
        The request; the base comes first.
    """
    base, item_bytes = parents[settings.base], _ITEM_BYTES[settings.out_dtype]
    ordered = {name: parents[name] for name in (settings.base, *settings.parents)}
    routes = any(not STAGES[kind].of_weights for kind in settings.kinds)
    sums = [method(name).task_vector_sum for name in settings.methods]
    sparsifiers = [one.sparsifier for one in sums if one is not None and one.sparsifier is not None]
    fine_tunes = [parents[name] for name in settings.parents]
    elements = sum(prod(info.shape) for parent in fine_tunes for info in parent.tensors.values())
    tensors = sum(len(parent.tensors) for parent in fine_tunes)
    return MemoryRequest(
        {name: parent_size(parent) for name, parent in ordered.items()},
        parent_size(base, item_bytes),
        live_models=1 + len(parents) if routes else 1,
        scoring=replace(
            scoring_size(base.config, item_bytes, base.layout.num_layers, card),
            engine=_engine_size(settings, base, item_bytes),
        ),
        tables=_TABLE_ENTRY * GRID * tensors if sparsifiers else 0,
        ranks=max((one.bytes_per_element for one in sparsifiers), default=0) * elements,
        workers=workers_of_a_card(settings, 1),
    )


def _engine_size(settings: Config, base: Parent, item_bytes: int) -> int:
    """Bytes that an engine takes of a card: its own weights, and its keys and values."""
    if not BACKENDS[settings.evaluation.backend].has_engine:
        return 0
    engine = settings.evaluation.engine
    weights = sum(prod(info.shape) for info in base.tensors.values()) * item_bytes
    return int(engine.cache_gb * 1e9) + weights // engine.tensor_parallel


def worker_memory(
    opened: Opened, *, is_shared: bool = False, holds_parents: bool = True, workers: int | None = None
) -> WorkerMemory:
    """Plans the memory of a worker of this process's cards.

    Args:
        opened: The open search.
        is_shared: Whether a process beside the workers holds the parents.
        holds_parents: Whether the worker scores candidates; a driver whose workers are others keeps the
            parents in their files.
        workers: That share a card; None for as many as the settings say.

    Returns:
        The plan, of the cards' whole size: it is the same for all workers of a card.

    Raises:
        SetupError: Where it does not fit.
    """
    devices, settings = device_names(opened.settings), opened.settings
    if not holds_parents:
        return WorkerMemory(None, devices[:1])
    sizes = [_size_of(device) for device in devices]
    request = memory_request(settings, opened.parents, sizes[0])
    if workers is not None:
        request = replace(request, workers=workers)
    plan = plan_memory(request, sizes, available_memory())
    references = {name: model.reference for name, model in settings.models.items()}
    return WorkerMemory(plan, devices, references if is_shared else None)


def _size_of(device: str) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def plan_data(settings: Config, parents: Mapping[str, Parent], cards: Cards | None) -> dict[str, Any]:
    """The plan of a search's memory as plain data.

    Args:
        settings: The settings of the search.
        parents: Model name -> its files.
        cards: Those that it is planned for; None for a CPU.

    Returns:
        'cards', their name; 'lines', what to print; 'fits'; and for cards 'gpus' and 'workers'.
    """
    request = memory_request(settings, parents, 0 if cards is None else min(cards.sizes))
    if cards is None and settings.cluster.ray not in (None, "local"):
        return {"cards": None, "fits": True, "lines": [_ELSEWHERE]}
    if cards is None:
        return {"cards": None, "fits": True, "lines": [_host_line(request)]}
    gpus = _gpus(settings, request, cards)
    workers = len(cards.sizes) // gpus * request.workers
    data: dict[str, Any] = {"cards": cards.name, "gpus": gpus, "workers": workers}
    host = request.models if cards.host is None else cards.host  # as much as can be needed
    try:
        plan = plan_memory(request, cards.sizes[:gpus], host)
    except SetupError as error:
        return data | {"fits": False, "lines": [str(error)]}
    return data | {"fits": True, "lines": _lines(settings, plan, gpus, workers, request, cards)}


def check_memory(
    settings: Config, parents: Mapping[str, Parent], cards: Cards | None, workers: int = 1
) -> str:
    """Plans the memory of a search that is about to be run.

    Args:
        settings: The settings of the search.
        parents: Model name -> its files.
        cards: Those of this machine; None for a CPU.
        workers: Processes of this machine, without Ray.

    Returns:
        The plan in one line; empty for a CPU, and where the cards are a cluster's.

    Raises:
        SetupError: Where it does not fit.
    """
    if cards is None or settings.cluster.ray not in (None, "local"):
        return ""
    gpus = max(1, int(settings.cluster.gpus or 1))
    host = available_memory() if cards.host is None else cards.host
    request = memory_request(settings, parents, cards.sizes[0])
    request = replace(request, workers=workers_of_a_card(settings, workers))
    plan = plan_memory(request, cards.sizes[:gpus], host)
    return "memory: " + "; ".join(describe(plan))


def _gpus(settings: Config, request: MemoryRequest, cards: Cards) -> int:
    """Cards of a worker: what the settings say, else as few as hold everything, else all of them."""
    given = settings.cluster.gpus
    if given is not None:
        return min(len(cards.sizes), max(1, int(given)))
    return fewest_cards(request, min(cards.sizes), len(cards.sizes)) or len(cards.sizes)


def _lines(
    settings: Config, plan: MemoryPlan, gpus: int, workers: int, request: MemoryRequest, cards: Cards
) -> list[str]:
    each = f"{gpus} cards each" if gpus > 1 else "a card each"
    if request.workers > 1:
        each = f"{request.workers} to a card"
    lines = [f"{workers} {'worker' if workers == 1 else 'workers'}, {each}", *describe(plan)]
    if gpus > 1 and settings.cluster.gpus is None:
        lines.append(f"a worker has one card unless the search file says cluster.gpus: {gpus}")
    if plan.pinned and cards.host is None:
        lines.append(f"the host needs {gigabytes(plan.pinned)} for each worker that can be pinned")
    return lines


def _host_line(request: MemoryRequest) -> str:
    """What a worker takes of a machine without cards."""
    live = request.live.total * request.live_models
    parents = sum(size.total for size in request.parents.values())
    there = available_memory()
    line = f"{gigabytes(live)} for each worker, {gigabytes(parents)} of parents stay in their files"
    if live > there:
        line += f"; {gigabytes(there)} are available: too little"
    return line
