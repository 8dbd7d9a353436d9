"""Where the parents of a search are kept: on the merging device, in pinned memory, or on disk.

On a CPU every parent stays memory-mapped, so that processes of one machine share its pages; of small ones the
tensors are kept once they were read: opening them again costs more than merging them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from evomerge.checkpoints import Parent

Placement = Literal["device", "pinned", "disk"]
_SMALL = 1 << 28  # bytes of parents whose tensors are kept on a CPU
_SLACK = 0.8  # of the free memory that parents may fill; the rest is for scoring


class PlacedParent:
    """A parent whose tensors are copied to the device or to pinned memory at their first read.

    Attributes:
        original: The parent.
        path: Of the parent, as are `files`, `config`, `tensors` and `layout`.
        is_resident: Whether the tensors are on the device, see `candidate_launch.ResidentParent`.
        is_padded: Whether each has room behind it, see there.
    """

    def __init__(self, parent: Parent, device: str | None) -> None:
        """Wraps a parent; reads nothing yet.

        Args:
            parent: The parent.
            device: torch's name of the device that keeps the tensors, None for pinned memory.
        """
        self.path, self.files = parent.path, parent.files
        self.config, self.tensors, self.layout = parent.config, parent.tensors, parent.layout
        self.original = parent
        self.is_resident, self.is_padded = device is not None, False
        self._device = device
        self._cache: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor; the same object at every call.
        """
        if name not in self._cache:
            tensor = self.original.tensor(name)
            self._cache[name] = tensor.pin_memory() if self._device is None else tensor.to(self._device)
        return self._cache[name]

    def content_hash(self) -> str:
        """See `Parent.content_hash`."""
        return self.original.content_hash()


def choose_placements(
    sizes: Mapping[str, int], base: str, device_free: int, host_free: int
) -> dict[str, Placement]:
    """Decides where each parent is kept.

    The base is placed first, since every merge reads it, then the others as long as they fit.

    Args:
        sizes: Model -> bytes, in the order in which they are placed.
        base: Name of the base.
        device_free: Free bytes on the device, without the model that is scored.
        host_free: Free bytes of the machine's memory; 0 where nothing is pinned.

    Returns:
        Model -> placement, the base first.
    """
    room = {"device": int(device_free * _SLACK), "pinned": int(host_free * _SLACK)}
    placements: dict[str, Placement] = {}
    for name in (base, *(name for name in sizes if name != base)):
        placement: Placement = "disk"
        if sizes[name] <= room["device"]:
            placement = "device"
        elif sizes[name] <= room["pinned"]:
            placement = "pinned"
        if placement != "disk":
            room[placement] -= sizes[name]
        placements[name] = placement
    return placements


def describe(placements: Mapping[str, Placement]) -> str:
    """A line for the log, such as 'base, math on the device; code on disk'.

    Args:
        placements: Model -> placement.

    Returns:
        The line.
    """
    words = {"device": "on the device", "pinned": "in pinned memory", "disk": "on disk"}
    parts = []
    for placement, where in words.items():
        names = [name for name, chosen in placements.items() if chosen == placement]
        if names:
            parts.append(f"{', '.join(names)} {where}")
    return "; ".join(parts)


def place_parent(parent: Parent, placement: Placement, device: str) -> Parent:
    """A parent whose tensors are kept where it was decided.

    Args:
        parent: The parent.
        placement: Where its tensors are kept.
        device: torch's name of the device that merges.

    Returns:
        The parent itself if it stays on disk, else one that copies its tensors as they are first read.
    """
    if placement == "disk":
        return parent
    return PlacedParent(parent, device if placement == "device" else None)


def free_memory(device: str) -> int:
    """Memory that parents may take on a device.

    Args:
        device: torch's name of the device.

    Returns:
        Free bytes of a CUDA device; on any other, what small parents may take.
    """
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else _SMALL
