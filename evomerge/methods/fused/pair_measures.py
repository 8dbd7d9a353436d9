"""Thresholds and norms of many task vectors at once, where a device measures them in few launches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evomerge.methods.fused import device_tables, one_pass, triton_kernels
from evomerge.methods.fused.tensor_table import TensorTable, row_layout
from evomerge.methods.fused.weighted_sum import TensorPair

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class PairMeasure:
    """What is known of x - base for many k.

    Attributes:
        unit: The unit of its norms, see `one_pass.exact_unit`.
        thresholds: [k] float32: magnitude of the k-th largest element.
        lasts: [k] int64: index of the last of the elements of this magnitude that belong; of equal ones the
            first come first.
        norms: [k] float64: sums of floor(unit * magnitude) over the k largest.
        whole: The sum over all elements.
    """

    unit: float
    thresholds: Array
    lasts: Array
    norms: Array
    whole: float


def measures(pair: TensorPair) -> bool:
    """Whether `measured` takes a pair.

    Args:
        pair: Two tensors.

    Returns:
        True on a device whose kernels measure many pairs in one launch.
    """
    return pair.n > 0 and triton_kernels.fits([pair.base.reshape(-1), pair.source.reshape(-1)])


def measured(pairs: Sequence[TensorPair], counts: Sequence[Sequence[int]]) -> list[PairMeasure]:
    """Measures pairs side by side, each number as the kernel backends give it one by one.

    Args:
        pairs: Such as `measures` takes.
        counts: For each pair as many k, ascending, each in [1, n].

    Returns:
        What was found of each pair, in their order.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(row_layout(pair.base, pair.base, [pair.source]), []).append(i)
    found: dict[int, PairMeasure] = {}
    for members in groups.values():
        for start in range(0, len(members), device_tables.ROWS_AT_ONCE):
            some = members[start : start + device_tables.ROWS_AT_ONCE]
            of_some = _measured_in_a_table([pairs[i] for i in some], [counts[i] for i in some])
            found |= dict(zip(some, of_some, strict=True))
    return [found[i] for i in range(len(pairs))]


def _measured_in_a_table(pairs: Sequence[TensorPair], counts: Sequence[Sequence[int]]) -> list[PairMeasure]:
    bases = [pair.base for pair in pairs]
    table = TensorTable(bases, bases, [[pair.source] for pair in pairs])
    tops = device_tables.largest(table)[:, 0].tolist()
    units = [one_pass.exact_unit(top, pair.n) for top, pair in zip(tops, pairs, strict=True)]
    thresholds, lasts = device_tables.top_k(table, np.array(counts, np.int64))
    norms = device_tables.top_k_norms(table, thresholds, lasts, torch.tensor(units)).double()
    rows = (t.cpu().numpy() for t in (thresholds, lasts, norms))
    return [
        PairMeasure(unit, threshold, last, norm[:-1], float(norm[-1]))
        for unit, threshold, last, norm in zip(units, *rows, strict=True)
    ]
