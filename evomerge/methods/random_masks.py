"""Keyed random bits: a mask bit depends on (key, element index) alone, never on device, chunks or order.

An index is mixed by a fixed bijection of 32-bit numbers and then hashed by multiply and shift with the key:
two multiplications shared by all parents and one for each, cheap enough to run inside the pass that merges.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
_WORD = 1 << 32


def mixed(start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """A fixed bijection of 32-bit numbers (Wellons' lowbias32) at consecutive indices.

    Tensors beyond 2**32 elements repeat.

    Args:
        start: First index.
        stop: The index after the last.
        device: Where the result lies; None for torch's default.

    Returns:
        [stop - start] int32.
    """
    x = torch.arange(start, stop, dtype=torch.int64, device=device).to(torch.int32)  # wraps modulo 2**32
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - _WORD)
    return x ^ ((x >> 16) & 0xFFFF)


def hashed(h: Tensor, key: tuple[int, int]) -> Tensor:
    """Hashes mixed indices with a key, by multiply and shift.

    Args:
        h: [n] int32, see `mixed`.
        key: (bits to mix in, odd factor), see `split`.

    Returns:
        [n] int32, uniform over all 32-bit numbers.

    References:
        Dietzfelbinger et al. 1997, A reliable randomized algorithm for the closest-pair problem.
    """
    return (h ^ key[0]) * key[1]


def split(mask_key: int) -> tuple[int, int]:
    """The two numbers that `hashed` takes from a mask key.

    Args:
        mask_key: 64 bits.

    Returns:
        (bits to mix in, odd factor), both as signed 32-bit numbers.
    """
    return _signed(mask_key & (_WORD - 1)), _signed(((mask_key >> 32) & (_WORD - 1)) | 1)


def bound(density: float) -> int:
    """The number below which a given share of all hashes lies.

    Args:
        density: The share, in [0, 1].

    Returns:
        A signed 32-bit number; 2**31 for all.
    """
    return min(1 << 31, math.ceil(density * _WORD) - (1 << 31))


@functools.cache
def grid_bounds(grid: int) -> Array:
    """The bounds of the densities 1/grid, 2/grid, ..., 1.

    Args:
        grid: How many.

    Returns:
        [grid] int64, ascending, the last 2**31; read-only.
    """
    bounds = np.array([*(bound(j / grid) for j in range(1, grid)), 1 << 31], np.int64)
    bounds.setflags(write=False)
    return bounds


def _signed(word: int) -> int:
    return word - _WORD if word >= 1 << 31 else word
