"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795): drop the smallest and largest entries.

Of entries of equal magnitude the first come first; mergekit takes what its unstable sort puts first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.methods.declaration import Param, SourceValues, Sparsifier, TaskVectorSum
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair
from evomerge.methods.task_vectors import task_vector_method


def band(n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many entries of largest magnitude bound the band that is kept, counted as mergekit does.

    int(density n) entries stay; gamma n outliers go, fewer where the density leaves no room for that.

    Args:
        n: Number of entries.
        density: Share of entries to keep, in [0, 1].
        gamma: Share of entries that are outliers, in [0, 1].

    Returns:
        (inner, outer): the `inner` largest entries are kept, less the `outer` largest.
    """
    target, top = int(density * n), int(gamma * n)
    inner = n - max(0, n - target - top)
    return inner, inner - target


def mask(
    delta: Tensor, density: float, key: int, values: SourceValues, mergekit_compatible: bool = False
) -> Tensor:
    """See `MaskFunction.__call__`: the entries in the `band` of magnitudes; values: gamma."""
    n = delta.numel()
    inner, outer = band(n, density, values["gamma"])
    size = delta.abs().flatten()
    size = size if size.dtype == torch.float64 else size.float()
    out = torch.zeros_like(delta).flatten()
    if mergekit_compatible:
        out[torch.sort(size).indices[n - inner : n - outer]] = 1
    else:
        out[torch.argsort(size, descending=True, stable=True)[outer:inner]] = 1
    return out.reshape(delta.shape)


def summand(pair: TensorPair, values: SourceValues, mask_key: int, tables: MagnitudeTables) -> Summand:
    """See `SummandFunction.__call__`."""
    inner, outer = band(pair.n, values["density"], values["gamma"])
    return Summand(
        MaskKind.BAND,
        values["weight"],
        inner=tables.top(pair, inner),
        outer=tables.top(pair, outer) if outer else None,
    )


_GAMMA = Param("gamma", 0.0, 0.1, 0.01, hard_low=0.0, hard_high=1.0)
MIDDLE = Sparsifier(mask, summand, uses_top_table=True)
BREADCRUMBS = task_vector_method(
    "breadcrumbs",
    TaskVectorSum(MIDDLE),
    (_GAMMA,),
    normalize=False,
    paper="arXiv 2312.06795",
    summary="trim small entries and outliers, sum",
)
BREADCRUMBS_TIES = task_vector_method(
    "breadcrumbs_ties",
    TaskVectorSum(MIDDLE, elect_sign=True),
    (_GAMMA,),
    normalize=False,
    paper="arXiv 2312.06795, 2306.01708",
    summary="trim small entries and outliers, elect a sign, sum those that agree",
)
