"""A model's tensors in one allocation for each type, where kernels read and write whole blocks of elements.

Each tensor begins at a multiple of `ALIGNMENT` elements and what lies between two of them is zero, so that
16-byte loads and masks of whole blocks never meet a tensor's end in the middle of an access.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.safetensors_headers import TensorInfo

ALIGNMENT = 64
"""Elements at whose multiples a tensor begins."""
STORED_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' name of a type that a merge can take -> torch's type."""


@dataclass(frozen=True, slots=True)
class ArenaPlace:
    """Where a tensor lies.

    Attributes:
        dtype: Its type, and with it the allocation.
        offset: Index of its first element in the allocation, a multiple of `ALIGNMENT`.
        shape: Its shape.
    """

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements, without padding."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Places of a model's tensors, before anything is allocated.

    Attributes:
        places: Name -> place, in the given order.
        lengths: Type -> elements of its allocation, padding included.
    """

    places: Mapping[str, ArenaPlace]
    lengths: Mapping[torch.dtype, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all allocations together."""
        return sum(length * dtype.itemsize for dtype, length in self.lengths.items())


def arena_layout(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> ArenaLayout:
    """Places tensors one after the other, each type in an allocation of its own.

    Args:
        tensors: Name -> (shape, type), in the order in which they are to lie.

    Returns:
        The layout.
    """
    places: dict[str, ArenaPlace] = {}
    lengths: dict[torch.dtype, int] = {}
    for name, (shape, dtype) in tensors.items():
        place = ArenaPlace(dtype, lengths.setdefault(dtype, 0), tuple(shape))
        places[name] = place
        lengths[dtype] += -(-place.count // ALIGNMENT) * ALIGNMENT
    return ArenaLayout(places, lengths)


def arena_layout_of_headers(headers: Mapping[str, TensorInfo]) -> ArenaLayout:
    """Places the tensors of a checkpoint, in their stored types.

    Args:
        headers: Name -> header facts, such as `Parent.tensors`, in the order in which they are to lie.

    Returns:
        The layout.
    """
    return arena_layout({name: (info.shape, STORED_TYPES[info.dtype]) for name, info in headers.items()})


class Arena:
    """Tensors over one allocation for each type.

        arena = allocate_arena(arena_layout_of_headers(parent.tensors), "cuda")
        for name, view in arena.view.items():
            view.copy_(parent.tensor(name))

    Attributes:
        layout: Where the tensors lie.
        allocations: Type -> [elements] the allocation.
        view: Name -> tensor, contiguous, a view of its allocation.
    """

    def __init__(self, layout: ArenaLayout, allocations: Mapping[torch.dtype, Tensor]) -> None:
        """Takes over allocations, such as those that another process handed on.

        Args:
            layout: Where the tensors lie.
            allocations: Type -> flat tensor of that type, of the layout's length; its padding is zero.

        Raises:
            ValueError: An allocation is missing, or has another type or length.
        """
        self.layout = layout
        self.allocations = dict(allocations)
        for dtype, length in layout.lengths.items():
            flat = self.allocations.get(dtype)
            if flat is None or flat.dtype != dtype or tuple(flat.shape) != (length,):
                found = "nothing" if flat is None else f"{tuple(flat.shape)} of {flat.dtype}"
                raise ValueError(f"an arena needs {length} elements of {dtype}, got {found}")
        self.view: dict[str, Tensor] = {
            name: self.allocations[place.dtype][place.offset : place.offset + place.count].view(place.shape)
            for name, place in layout.places.items()
        }


def allocate_arena(layout: ArenaLayout, device: str | torch.device, *, pinned: bool = False) -> Arena:
    """Allocates an arena of zeros.

    Args:
        layout: Where the tensors will lie.
        device: Where the memory is.
        pinned: Whether memory of the host is page-locked, for copies to a device.

    Returns:
        The arena.

    Raises:
        RuntimeError: There is not enough memory.
    """
    flats = {
        dtype: torch.zeros(length, dtype=dtype, device=device, pin_memory=pinned)
        for dtype, length in layout.lengths.items()
    }
    return Arena(layout, flats)


def move_into_arenas(tensors: Iterable[Tensor]) -> None:
    """Makes tensors such as parameters views of one arena for each device; the objects stay the same.

    Views of them that are held elsewhere keep the old memory.

    Args:
        tensors: Moved in their order, each once; what is not contiguous becomes so.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, {})[str(id(tensor))] = tensor
    with torch.no_grad():
        for device, members in by_device.items():
            layout = arena_layout({key: (tuple(t.shape), t.dtype) for key, t in members.items()})
            views = allocate_arena(layout, device).view
            for key, tensor in members.items():
                views[key].copy_(tensor)
                tensor.data = views[key]
