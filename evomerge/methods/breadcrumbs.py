"""Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795): drop the smallest and largest entries.

Of entries of equal magnitude the first come first; mergekit takes what its unstable sort puts first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.declaration import MaskNumbers, Param, SourceValues, Sparsifier, TaskVectorSum
from evomerge.methods.fused.difference_rows import Array, DifferenceRows
from evomerge.methods.fused.launch_numbers import HIGH, HIGH_LAST, LAST, LOW, MOST, LaunchNumbers
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.sum_numbers import MaskKeys, write_bound
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


def mask_numbers(
    numbers: LaunchNumbers,
    rows: DifferenceRows,
    values: Mapping[str, Array],
    keys: MaskKeys | None,
    is_masked: Array,
) -> Array:
    """See `MaskNumbersFunction.__call__`: the counts are those of `band`."""
    n = rows.sizes
    target, top = ((values[name] * n).astype(np.int64) for name in ("density", "gamma"))
    inner = n - np.maximum(0, n - target - top)
    outer = inner - target
    thresholds, lasts, norms = rows.tops(inner, is_masked)
    write_bound(numbers, (LOW, LAST), thresholds, lasts)
    is_bounded = outer > 0
    thresholds, lasts, _ = rows.tops(outer, is_masked & is_bounded)
    thresholds = np.where(is_bounded, thresholds, np.float32(np.nan))
    write_bound(numbers, (HIGH, HIGH_LAST), thresholds, np.where(is_bounded, lasts, MOST))
    return np.where(is_bounded, np.nan, norms)


_GAMMA = Param("gamma", 0.0, 0.1, 0.01, hard_low=0.0, hard_high=1.0)
MIDDLE = Sparsifier(
    mask, summand, uses_top_table=True, masks=MaskNumbers(MaskKind.BAND, mask_numbers, is_bounded=True)
)
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
