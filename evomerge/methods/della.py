"""DELLA (Deep et al. 2024, arXiv 2406.11617): drop entries at random, the small ones of a row more often.

The keep probability is linear in an entry's rank by magnitude within its row (last axis), from density - epsilon to
density + epsilon. mergekit refuses an epsilon that leaves (0, 1) and ranks tensors of three and more axes along the
second; here epsilon shrinks to min(epsilon, density, 1 - density), so that every point of a search can be merged.
Masks are keyed (see `hashing`); for mergekit's they agree in distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.methods import random_masks, task_vectors
from evomerge.methods.declaration import Param, TaskVectorSum


def window(density: float, epsilon: float, width: int) -> tuple[float, float]:
    """(probability of the smallest entry of a row, growth for each rank) for rows of `width` entries."""
    epsilon = min(epsilon, density, 1 - density) if width > 1 else 0.0
    return density - epsilon, 2 * epsilon / max(1, width - 1)


def keep(
    delta: Tensor, density: float, key: int, own: Mapping[str, float], mergekit_compatible: bool = False
) -> Tensor:
    """0/1 mask, each entry kept with its own probability; own: epsilon. Same shape and dtype as delta."""
    width = delta.shape[-1] if delta.dim() else 1
    low, step = window(density, own["epsilon"], width)
    order = delta.abs().reshape(-1, width).argsort(dim=1, stable=True)
    place = torch.arange(width, device=delta.device).expand_as(order)
    p = torch.empty_like(order).scatter_(1, order, place).flatten().float() * step + low
    u = random_masks.hashed(random_masks.mixed(0, delta.numel(), delta.device), random_masks.split(key))
    return (u.float() < p * 2.0**32 - 2.0**31).to(delta.dtype).reshape(delta.shape)


_EPSILON = Param("epsilon", 0.0, 0.2, 0.15, hard_low=0.0, hard_high=0.5)
DELLA = task_vectors.method(
    "della",
    TaskVectorSum(sparsify="rank", elect_sign=True),
    keep,
    (_EPSILON,),
    normalize=True,
    rescale=True,
    paper="arXiv 2406.11617",
    summary="drop small entries more often, rescale, elect a sign, sum those that agree",
)
DELLA_LINEAR = task_vectors.method(
    "della_linear",
    TaskVectorSum(sparsify="rank"),
    keep,
    (_EPSILON,),
    normalize=False,
    rescale=True,
    paper="arXiv 2406.11617",
    summary="drop small entries more often, rescale, sum",
)
