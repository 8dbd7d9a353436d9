"""Where a worker keeps its models: by a plan of memory on cards, in their files on a CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evomerge.checkpoints import Parent
from evomerge.evaluation.scoring_size import scoring_size
from evomerge.merging import parent_placement
from evomerge.merging.host_memory import available_memory
from evomerge.merging.memory_plan import MemoryPlan, MemoryRequest, parent_size, plan_memory
from evomerge.workers.held_parents import HeldParents, attach
from evomerge.workers.parent_holder import HoldRequest

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """How a worker uses the memory of its cards.

    Attributes:
        plan: What lies where; None where parents stay in their files, as of a driver whose workers are other
            processes.
        devices: torch's names of the plan's cards, the one that scores first.
        references: Name -> reference of each parent, where a process beside the workers is to hold them:
            those of a card then share them, and one that is started again need not read them.
    """

    plan: MemoryPlan | None
    devices: tuple[str, ...]
    references: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class PlacedParents:
    """The parents of a worker.

    Attributes:
        parents: Name -> parent, where merges read it.
        description: Where they are, in words.
        held: The memory of another process that they are in; None where they are this one's.
    """

    parents: Mapping[str, Parent]
    description: str
    held: HeldParents | None = None

    @property
    def is_lost(self) -> bool:
        """Whether the process that held them has ended."""
        return self.held is not None and self.held.lost.is_set()


def place(
    parents: Mapping[str, Parent], base: str, dtype: str, device: str, memory: WorkerMemory | None
) -> PlacedParents:
    """The parents where a worker keeps them.

    Args:
        parents: Name -> parent.
        base: Name of the base.
        dtype: torch's name of the type that is scored.
        device: torch's name of the device that scores.
        memory: What was planned; None to plan for everything on the device.

    Returns:
        The parents.

    Raises:
        SetupError: They do not fit.
    """
    if not device.startswith("cuda"):
        kept = parent_placement.keep_small(parents, base)
        return PlacedParents(kept, parent_placement.describe(kept, None))
    if memory is not None and memory.plan is None:
        return PlacedParents(parents, parent_placement.describe(parents, None))
    if memory is None:
        memory = WorkerMemory(_plan(parents, base, dtype, device), (device,))
    assert memory.plan is not None
    held = None
    if memory.references is not None:
        request = HoldRequest(memory.references, memory.plan, memory.devices, os.getppid())
        held = attach(parents, request)
    arenas = held.arenas if held else parent_placement.load_parents(parents, memory.plan, memory.devices)
    where = parent_placement.describe(parents, memory.plan)
    return PlacedParents(parent_placement.placed(parents, arenas), where, held)


def _plan(parents: Mapping[str, Parent], base: str, dtype: str, device: str) -> MemoryPlan:
    """A plan for one worker that has a card to itself."""
    sizes = {name: parent_size(parents[name]) for name in (base, *(n for n in parents if n != base))}
    item_bytes, total = _ITEM_BYTES[dtype], int(torch.cuda.get_device_properties(device).total_memory)
    live = parent_size(parents[base], item_bytes)
    scoring = scoring_size(parents[base].config, item_bytes, len(live.layers), total)
    return plan_memory(MemoryRequest(sizes, live, scoring=scoring), [total], available_memory())
