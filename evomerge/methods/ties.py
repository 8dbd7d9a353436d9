"""TIES (Yadav et al. 2023, arXiv 2306.01708): keep the largest entries, elect a sign, sum those that agree.

Of entries of equal magnitude the first come first; mergekit takes what its unstable sort puts first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.declaration import MaskNumbers, SourceValues, Sparsifier, TaskVectorSum
from evomerge.methods.fused.difference_rows import Array, DifferenceRows
from evomerge.methods.fused.launch_numbers import LAST, LOW, LaunchNumbers
from evomerge.methods.fused.magnitude_tables import MagnitudeTables, top_count
from evomerge.methods.fused.sum_numbers import MaskKeys, write_bound
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair
from evomerge.methods.task_vectors import task_vector_method


def mask(
    delta: Tensor,
    density: float,
    key: int = 0,
    values: SourceValues | None = None,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `MaskFunction.__call__`: the max(1, int(density * numel)) entries of largest magnitude.

    Neither key nor values are used.
    """
    size = delta.abs().flatten()
    size = size if size.dtype == torch.float64 else size.float()
    order = torch.argsort(size, descending=True, stable=not mergekit_compatible)
    out = torch.zeros_like(delta).flatten()
    out[order[: top_count(density, delta.numel())]] = 1
    return out.reshape(delta.shape)


def summand(pair: TensorPair, values: SourceValues, mask_key: int, tables: MagnitudeTables) -> Summand:
    """See `SummandFunction.__call__`."""
    top = tables.top(pair, top_count(values["density"], pair.n))
    return Summand(MaskKind.BAND, values["weight"], inner=top)


def mask_numbers(
    numbers: LaunchNumbers,
    rows: DifferenceRows,
    values: Mapping[str, Array],
    keys: MaskKeys | None,
    is_masked: Array,
) -> Array:
    """See `MaskNumbersFunction.__call__`."""
    counts = np.maximum(1, (values["density"] * rows.sizes).astype(np.int64))
    thresholds, lasts, norms = rows.tops(counts, is_masked)
    write_bound(numbers, (LOW, LAST), thresholds, lasts)
    return norms


LARGEST = Sparsifier(mask, summand, uses_top_table=True, masks=MaskNumbers(MaskKind.BAND, mask_numbers))
TIES = task_vector_method(
    "ties",
    TaskVectorSum(LARGEST, elect_sign=True),
    normalize=True,
    paper="arXiv 2306.01708",
    summary="trim small entries, elect a sign, sum those that agree",
)
