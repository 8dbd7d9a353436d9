"""TIES (Yadav et al. 2023, arXiv 2306.01708): keep the largest entries, elect a sign, sum those that agree.

Of entries of equal magnitude the first come first; mergekit takes what its unstable sort puts first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.methods import task_vectors
from evomerge.methods.declaration import TaskVectorSum


def count(density: float, n: int) -> int:
    """How many of n entries are kept: max(1, int(density * n)), none at density 0."""
    return max(1, int(density * n)) if density > 0 else 0


def largest(
    delta: Tensor,
    density: float,
    key: int = 0,
    own: Mapping[str, float] | None = None,
    mergekit_compatible: bool = False,
) -> Tensor:
    """0/1 mask of the max(1, int(density * numel)) entries of largest magnitude.

    density in (0, 1). Same shape and dtype as delta; key and own are not used.
    """
    size = delta.abs().flatten()
    size = size if size.dtype == torch.float64 else size.float()
    order = torch.argsort(size, descending=True, stable=not mergekit_compatible)
    mask = torch.zeros_like(delta).flatten()
    mask[order[: count(density, delta.numel())]] = 1
    return mask.reshape(delta.shape)


TIES = task_vectors.method(
    "ties",
    TaskVectorSum(sparsify="largest", elect_sign=True),
    largest,
    normalize=True,
    paper="arXiv 2306.01708",
    summary="trim small entries, elect a sign, sum those that agree",
)
