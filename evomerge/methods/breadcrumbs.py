"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795): drop the smallest entries and the largest outliers.

Of entries of equal magnitude the first come first; mergekit takes what its unstable sort puts first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.methods import task_vectors
from evomerge.methods.declaration import Param, TaskVectorSum


def band(n: int, density: float, gamma: float) -> tuple[int, int]:
    """(inner, outer): of n entries the `inner` largest are kept, less the `outer` largest, counted as mergekit does.

    int(density n) entries stay; gamma n outliers go, fewer where the density leaves no room for that.
    """
    target, top = int(density * n), int(gamma * n)
    inner = n - max(0, n - target - top)
    return inner, inner - target


def middle(
    delta: Tensor, density: float, key: int, own: Mapping[str, float], mergekit_compatible: bool = False
) -> Tensor:
    """0/1 mask of the entries in the `band` of magnitudes; own: gamma. Same shape and dtype as delta."""
    n = delta.numel()
    inner, outer = band(n, density, own["gamma"])
    size = delta.abs().flatten()
    size = size if size.dtype == torch.float64 else size.float()
    mask = torch.zeros_like(delta).flatten()
    if mergekit_compatible:
        mask[torch.sort(size).indices[n - inner : n - outer]] = 1
    else:
        mask[torch.argsort(size, descending=True, stable=True)[outer:inner]] = 1
    return mask.reshape(delta.shape)


_GAMMA = Param("gamma", 0.0, 0.1, 0.01, hard_low=0.0, hard_high=1.0)
BREADCRUMBS = task_vectors.method(
    "breadcrumbs",
    TaskVectorSum(sparsify="band"),
    middle,
    (_GAMMA,),
    normalize=False,
    paper="arXiv 2312.06795",
    summary="trim small entries and outliers, sum",
)
BREADCRUMBS_TIES = task_vectors.method(
    "breadcrumbs_ties",
    TaskVectorSum(sparsify="band", elect_sign=True),
    middle,
    (_GAMMA,),
    normalize=False,
    paper="arXiv 2312.06795, 2306.01708",
    summary="trim small entries and outliers, elect a sign, sum those that agree",
)
