"""DARE (Yu et al. 2024, arXiv 2311.03099): drop entries of the task vectors at random, rescale the rest.

Masks are keyed, not drawn: an entry's bit is a function of (mask key, element index) alone, so device, chunking
and order cannot change it, and the masks nest: what density .3 keeps, density .5 keeps too. The rescale matches
the L1 norm, as mergekit does since 2025, not the paper's 1/density.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from evomerge.methods import task_vectors
from evomerge.methods.method import Method

_BITS = 31  # a uniform number is one of 2**31


def uniform(key: int, n: int, device: torch.device | None = None) -> Tensor:
    """[n] int64 in [0, 2**31), uniform: SplitMix64 (Steele et al. 2014) of key + index, upper bits."""
    z = torch.arange(1, n + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15) + key  # wraps mod 2**64
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 64 - _BITS)


def keep(delta: Tensor, density: float, key: int) -> Tensor:
    """0/1 mask that keeps each entry with probability density in [0, 1]; same shape and dtype as delta."""
    mask = uniform(key, delta.numel(), delta.device) < int(density * 2**_BITS)
    return mask.to(delta.dtype).reshape(delta.shape)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right of 64-bit words held as int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


DARE_LINEAR = Method(
    name="dare_linear",
    kernel=partial(task_vectors.merge, sparsify=keep),
    params=task_vectors.params(normalize=False, rescale=True, density=True),
    needs_base=True,
    randomized=True,
    paper="arXiv 2311.03099",
    summary="drop entries at random, rescale, sum",
)
DARE_TIES = Method(
    name="dare_ties",
    kernel=partial(task_vectors.merge, sparsify=keep, elect_sign=True),
    params=task_vectors.params(normalize=False, rescale=True, density=True),
    needs_base=True,
    randomized=True,
    paper="arXiv 2311.03099, 2306.01708",
    summary="drop entries at random, rescale, elect a sign, sum those that agree",
)
