"""Keyed random bits: a mask bit is a function of (key, element index) alone, so device, chunks and order cannot change it.

An index is mixed by a fixed bijection of 32-bit numbers and then hashed by multiply and shift with the key: two
multiplications shared by all parents and one for each, cheap enough to run inside the pass that merges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 1 << 32


def mixed(start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """[stop - start] int32: a fixed bijection of 32-bit numbers (Wellons' lowbias32) at start, ..., stop - 1.

    Tensors beyond 2**32 elements repeat.
    """
    x = torch.arange(start, stop, dtype=torch.int64, device=device).to(torch.int32)  # wraps modulo 2**32
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - _WORD)
    return x ^ ((x >> 16) & 0xFFFF)


def hashed(h: Tensor, key: tuple[int, int]) -> Tensor:
    """int32, uniform over all 32-bit numbers: multiply-shift hashing (Dietzfelbinger et al. 1997) of `mixed` indices."""
    return (h ^ key[0]) * key[1]


def split(mask_key: int) -> tuple[int, int]:
    """(bits to mix in, odd factor) of a 64-bit mask key, both as signed 32-bit numbers."""
    return _signed(mask_key & (_WORD - 1)), _signed(((mask_key >> 32) & (_WORD - 1)) | 1)


def bound(density: float) -> int:
    """The signed 32-bit number below which a share `density` in [0, 1] of all hashes lies; 2**31 keeps all."""
    return min(1 << 31, math.ceil(density * _WORD) - (1 << 31))


def _signed(word: int) -> int:
    return word - _WORD if word >= 1 << 31 else word
