"""Where the parents of a search are kept: on the device that merges, in pinned memory, or on disk behind the page cache.

On a CPU every parent stays memory-mapped, so that processes of one machine share its pages; of small ones the tensors are
kept once they were read: opening them again costs more than merging them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from evomerge.checkpoints import Parent

Place = Literal["device", "pinned", "disk"]
_SMALL = 1 << 28  # bytes of parents whose tensors are kept on a CPU
_SLACK = 0.8  # of the free memory that parents may fill; the rest is for scoring


def plan(sizes: Mapping[str, int], base: str, device_free: int, host_free: int) -> dict[str, Place]:
    """Model -> place: the base first, since every merge reads it, then the others in order, as long as they fit.

    sizes, device_free, host_free: bytes; device_free without the model that is scored.
    """
    room = {"device": int(device_free * _SLACK), "pinned": int(host_free * _SLACK)}
    found: dict[str, Place] = {}
    for name in (base, *(name for name in sizes if name != base)):
        place: Place = next((p for p in ("device", "pinned") if sizes[name] <= room[p]), "disk")
        if place != "disk":
            room[place] -= sizes[name]
        found[name] = place
    return found


def said(places: Mapping[str, Place]) -> str:
    """'base, math on the device; code on disk': a line for the log."""
    words = {"device": "on the device", "pinned": "in pinned memory", "disk": "on disk"}
    parts = [
        (words[p], [name for name, at in places.items() if at == p]) for p in ("device", "pinned", "disk")
    ]
    return "; ".join(f"{', '.join(names)} {where}" for where, names in parts if names)


def held(parent: Parent, place: Place, device: str) -> Parent:
    """The parent itself if it stays on disk, else one whose tensors are copied to their place when they are first read."""
    if place == "disk":
        return parent
    kept: dict[str, Tensor] = {}
    read = parent.tensor

    def tensor(name: str) -> Tensor:
        if name not in kept:
            kept[name] = read(name).to(device) if place == "device" else read(name).pin_memory()
        return kept[name]

    return cast(Parent, _Held(parent, tensor))


class _Held:
    """A parent that reads its tensors elsewhere."""

    def __init__(self, parent: Parent, tensor: object) -> None:
        self._parent, self.tensor = parent, tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self._parent, name)


def free_memory(device: str) -> int:
    """Free bytes on a CUDA device; on any other, what its small parents may take."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else _SMALL
