"""TIES (Yadav et al. 2023, arXiv 2306.01708): keep the largest entries, elect a sign, sum those that agree."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from evomerge.methods import task_vectors
from evomerge.methods.method import Method


def largest(delta: Tensor, density: float, key: int = 0) -> Tensor:
    """0/1 mask of the max(1, int(density * numel)) entries of largest magnitude; of equal ones the first come first.

    density in [0, 1); at 0 nothing is kept. Same shape and dtype as delta; key is not used.
    """
    n = delta.numel()
    if density <= 0 or n == 0:
        return torch.zeros_like(delta)
    k = max(1, int(density * n))
    size = delta.abs().flatten()
    threshold = size.kthvalue(n - k + 1).values
    above, level = size > threshold, size == threshold
    room = k - above.sum()  # entries at the threshold that still fit
    return (above | (level & (level.cumsum(0) <= room))).to(delta.dtype).reshape(delta.shape)


TIES = Method(
    name="ties",
    kernel=partial(task_vectors.merge, sparsify=largest, elect_sign=True),
    params=task_vectors.params(normalize=True, rescale=False, density=True),
    needs_base=True,
    paper="arXiv 2306.01708",
    summary="trim small entries, elect a sign, sum those that agree",
)
