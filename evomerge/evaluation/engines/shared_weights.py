"""Tensors in memory that two processes share: nothing is written to a disk, and nothing passes a pipe."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """Where a tensor lies.

    Attributes:
        name: Name on disk.
        dtype: torch's name of its type, such as 'bfloat16'.
        shape: Its shape.
        start: First byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class SharedWeights:
    """The tensors of a model, in a file without a name that lies in memory.

        weights = SharedWeights.for_tensors(tensors)
        changed = weights.write(tensors)
        # in another process
        views = SharedWeights.attached(path, size).views(changed)

    Attributes:
        path: Another process of this user opens it there while this one lives.
        size: Bytes.
    """

    def __init__(self, descriptor: int, path: str, size: int) -> None:
        """Maps the memory; see `for_tensors` and `attached`."""
        self.path, self.size = path, size
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._tensors: dict[str, SharedTensor] = {}
        self._written: set[str] = set()

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> SharedWeights:
        """Makes room for tensors.

        Args:
            tensors: Name -> tensor, for types and shapes.

        Returns:
            The shared memory, not written yet.
        """
        places, end = [], 0
        for name, tensor in tensors.items():
            places.append(
                SharedTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end)
            )
            end += math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
        size = max(end, _ALIGNMENT)
        descriptor = os.memfd_create("evomerge weights", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        weights = cls(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", size)
        weights._tensors = {place.name: place for place in places}
        return weights

    @classmethod
    def attached(cls, path: str, size: int) -> SharedWeights:
        """Maps what another process made.

        Args:
            path: Its path there.
            size: Bytes.

        Returns:
            The same memory.
        """
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), path, size)

    def write(self, tensors: Mapping[str, Tensor]) -> list[SharedTensor]:
        """Writes the tensors whose bytes differ from what is there.

        Args:
            tensors: Those of `for_tensors`.

        Returns:
            Where those that changed lie; all of them the first time.

        Raises:
            KeyError: A name is new.
        """
        changed = []
        for name, tensor in tensors.items():
            place = self._tensors[name]
            mine = self._view(place)
            given = tensor.detach().to("cpu")
            if name in self._written and torch.equal(_bits(mine), _bits(given)):
                continue
            mine.copy_(given)
            self._written.add(name)
            changed.append(place)
        return changed

    def places(self, names: Iterable[str]) -> list[SharedTensor]:
        """Where tensors lie.

        Args:
            names: Some of those of `for_tensors`.

        Returns:
            Their places.
        """
        return [self._tensors[name] for name in names]

    def views(self, tensors: Sequence[SharedTensor]) -> dict[str, Tensor]:
        """Tensors that are parts of the shared memory.

        Args:
            tensors: Where they lie.

        Returns:
            Name -> tensor.
        """
        return {place.name: self._view(place) for place in tensors}

    def close(self) -> None:
        """Unmaps the memory, unless a view is still in use; it is freed with the last process that has it."""
        del self._bytes
        with contextlib.suppress(BufferError):  # somebody holds a view
            self._map.close()
        os.close(self._descriptor)

    def _view(self, place: SharedTensor) -> Tensor:
        dtype: torch.dtype = getattr(torch, place.dtype)
        end = place.start + math.prod(place.shape) * dtype.itemsize
        return self._bytes[place.start : end].view(dtype).view(place.shape)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as whole numbers: NaN equals itself, and -0 is not 0."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind)
