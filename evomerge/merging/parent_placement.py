"""Where the parents of a search are kept: on the cards of a worker, in pinned memory, or in their files.

With a plan of memory every parent is loaded at once, into arenas that are allocated before anything is read.
On a CPU every parent stays memory-mapped, so that processes of one machine share its pages; of small ones the
tensors are kept once they were read: opening them again costs more than merging them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.checkpoints import Parent, total_bytes
from evomerge.errors import SetupError
from evomerge.merging.arena import Arena, allocate_arena, arena_layout_of_headers
from evomerge.merging.memory_plan import MemoryPlan, gigabytes
from evomerge.merging.parent_loading import fill_arenas

log = logging.getLogger(__name__)
_SMALL = 214_748_364  # bytes of parents whose tensors are kept on a CPU
Placement = Literal["device", "pinned", "disk"]
HOST = -1
"""Index of pinned memory among the destinations of a parent; those of cards are from 0."""

ParentArenas = Mapping[int, Arena]
"""Destination -> arena of one parent."""


class PlacedParent:
    """A parent whose tensors are kept once they were read.

    Attributes:
        original: The parent.
        path: Of the parent, as are `files`, `config`, `tensors` and `layout`.
        is_resident: Whether the tensors are where they are merged, see `candidate_launch.ResidentParent`.
        is_padded: Whether each has room behind it, see there.
    """

    def __init__(
        self, parent: Parent, tensors: Mapping[str, Tensor] | None = None, *, is_resident: bool = True
    ) -> None:
        """Wraps a parent; reads nothing yet.

        Args:
            parent: The parent.
            tensors: Name -> tensor of arenas; None for tensors that are kept as they are first read.
            is_resident: Whether they are all where they are merged.
        """
        self.is_resident, self.is_padded = is_resident, tensors is not None
        self.path, self.files = parent.path, parent.files
        self.config, self.tensors, self.layout = parent.config, parent.tensors, parent.layout
        self.original = parent
        self._cache: dict[str, Tensor] = dict(tensors or {})

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor; the same object at every call.
        """
        if name not in self._cache:
            self._cache[name] = self.original.tensor(name)
        return self._cache[name]

    def content_hash(self) -> str:
        """See `Parent.content_hash`."""
        return self.original.content_hash()


def keep_small(parents: Mapping[str, Parent], base: str) -> dict[str, Parent]:
    """The parents as a CPU keeps them: small ones in memory once they were read.

    Args:
        parents: Name -> parent.
        base: Name of the base, which comes first, since every merge reads it.

    Returns:
        Name -> parent.
    """
    room, kept = _SMALL, dict(parents)
    for name in (base, *(name for name in parents if name != base)):
        size = total_bytes(parents[name])
        if size <= room:
            room -= size
            kept[name] = PlacedParent(parents[name])
    return kept


def place_parent(parent: Parent, placement: Placement, device: str) -> Parent:
    """One parent kept whole in one place.

    Args:
        parent: The parent.
        placement: Where.
        device: torch's name of the device that merges.

    Returns:
        The parent itself if it stays on disk; on a CPU one that keeps what was read, else one that is loaded.
    """
    if placement == "disk":
        return parent
    if device == "cpu":
        return PlacedParent(parent)
    where = 0 if placement == "device" else HOST
    arena = _allocated(parent, list(parent.tensors), where, [device])
    fill_arenas(parent.path.name, parent, [arena])
    return PlacedParent(parent, arena.view, is_resident=where != HOST)


def destinations(parent: Parent, name: str, plan: MemoryPlan) -> dict[int, list[str]]:
    """Where each tensor of a parent goes.

    Args:
        parent: The parent; only its headers are used.
        name: Its name in the plan.
        plan: The plan of memory.

    Returns:
        Index of a card, or `HOST` -> names of tensors, in the order of the headers.
    """
    names: dict[int, list[str]] = {}
    for tensor in parent.tensors:
        layer = parent.layout.place(tensor).layer
        where = HOST if plan.is_streamed(name, layer) else plan.card_of(layer)
        names.setdefault(where, []).append(tensor)
    return names


def load_parents(
    parents: Mapping[str, Parent], plan: MemoryPlan, devices: Sequence[str]
) -> dict[str, ParentArenas]:
    """Loads all parents at once to where they are planned.

    Args:
        parents: Name -> parent.
        plan: The plan of memory.
        devices: torch's names of the plan's cards.

    Returns:
        Name -> destination -> arena.

    Raises:
        SetupError: A card has less free memory than was planned with.
        CheckpointError: A file is broken or holds numbers that are none.
    """
    places = {name: destinations(parent, name, plan) for name, parent in parents.items()}
    check_free(parents, places, devices)
    arenas: dict[str, ParentArenas] = {
        name: {where: _allocated(parents[name], names, where, devices) for where, names in of.items()}
        for name, of in places.items()
    }
    for name, parent in parents.items():
        fill_arenas(name, parent, list(arenas[name].values()))
    return arenas


def placed(parents: Mapping[str, Parent], arenas: Mapping[str, ParentArenas]) -> dict[str, Parent]:
    """The parents over arenas that hold all their tensors.

    Args:
        parents: Name -> parent.
        arenas: Name -> destination -> arena.

    Returns:
        Name -> parent, whose tensors are views of the arenas.
    """
    found: dict[str, Parent] = {}
    for name, parent in parents.items():
        views = {key: view for arena in arenas[name].values() for key, view in arena.view.items()}
        found[name] = PlacedParent(parent, views, is_resident=HOST not in arenas[name])
    return found


def check_free(
    parents: Mapping[str, Parent], places: Mapping[str, Mapping[int, Sequence[str]]], devices: Sequence[str]
) -> None:
    """Checks that the cards have room for the parents now.

    Args:
        parents: Name -> parent.
        places: Name -> destination -> names of tensors.
        devices: torch's names of the cards.

    Raises:
        SetupError: One has not: another process uses it.
    """
    for card, device in enumerate(devices):
        if not device.startswith("cuda"):
            continue
        needed = sum(
            parents[name].tensors[tensor].nbytes for name, of in places.items() for tensor in of.get(card, ())
        )
        free, total = torch.cuda.mem_get_info(device)
        if needed > free:
            raise SetupError(
                f"{device} has {gigabytes(free)} of {gigabytes(total)} free, and the parents take "
                f"{gigabytes(needed)}: another process uses the card; end it, or take another card"
            )


def pin(tensor: Tensor) -> None:
    """Locks the pages of a tensor in the host's memory, for copies to a card; never run on one.

    torch's own pinned memory is rounded up to a power of two, which an arena of many GB cannot afford.

    Args:
        tensor: A flat tensor of the host.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error):
        log.warning(
            "pages of %s could not be locked (CUDA error %d): copies are slower",
            gigabytes(tensor.nbytes),
            int(error),
        )


def describe(parents: Mapping[str, Parent], plan: MemoryPlan | None) -> str:
    """A line for the log of where parents are.

    Args:
        parents: Name -> parent.
        plan: The plan of memory; None on a CPU.

    Returns:
        Such as 'base, math on the device; code streamed from pinned memory'.
    """
    if plan is None:
        kept = [name for name, parent in parents.items() if isinstance(parent, PlacedParent)]
        words = {"on the device": kept, "on disk": [name for name in parents if name not in kept]}
    else:
        streamed = [name for name in parents if name in plan.streamed]
        rest = [name for name in parents if name not in streamed]
        words = {"on the device": rest, "streamed from pinned memory": streamed}
    return "; ".join(f"{', '.join(names)} {where}" for where, names in words.items() if names)


def _allocated(parent: Parent, names: Sequence[str], where: int, devices: Sequence[str]) -> Arena:
    layout = arena_layout_of_headers({name: parent.tensors[name] for name in names})
    if where != HOST:
        return allocate_arena(layout, devices[where])
    arena = allocate_arena(layout, "cpu")
    if any(device.startswith("cuda") for device in devices):
        for flat in arena.allocations.values():
            pin(flat)
    return arena
