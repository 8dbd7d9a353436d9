"""The numbers of a launch for all its rows at once, from arrays of a method's values.

They are those that `merge_tensor.weighted_sum_of` gives row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.methods.declaration import Sparsifier, TaskVectorSum
from evomerge.methods.fused.difference_rows import DifferenceRows
from evomerge.methods.fused.launch_numbers import (
    DIVISOR,
    FACTOR,
    HIGH,
    LOW,
    MOST,
    SCALE,
    WEIGHT,
    Division,
    LaunchNumbers,
    SumForm,
    next_float32,
)
from evomerge.methods.fused.weighted_sum import MaskKind

Array = np.ndarray[Any, np.dtype[Any]]
_NO_DIVISOR = 1e-8  # of a sum with a base: a smaller sum of weights counts as 1


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """Keys of the random masks of the rows of a table.

    Attributes:
        seed: What they depend on besides the rows: equal seeds mean equal keys.
        words: [rows, sources, 2] int64: bits to mix in, odd factor, see `random_masks.split`.
    """

    seed: int
    words: Array


def dense_numbers(weights: Array) -> LaunchNumbers:
    """The numbers of a sum of whole tensors by one weight each.

    Args:
        weights: [rows, sources] float64.

    Returns:
        Numbers with divisor 1 and factor 1.
    """
    numbers = LaunchNumbers.blank(SumForm(MaskKind.DENSE), *weights.shape)
    numbers.floats[..., WEIGHT] = weights
    return numbers


def sum_numbers(
    rule: TaskVectorSum,
    values: Mapping[str, Array],
    rows: DifferenceRows | None,
    keys: MaskKeys | None,
    *,
    finds_scales: bool = True,
) -> tuple[LaunchNumbers, Array | None] | None:
    """The numbers of a weighted sum of task vectors.

    Args:
        rule: What the method declares of itself.
        values: Parameter -> [rows, sources] float64 of a parameter of each model, [rows] of one of the merge.
        rows: The task vectors; None for a method without a base.
        keys: Of the masks of a randomized sparsifier, else None.
        finds_scales: Whether the launch may be left to find scales that no table holds; else the tables are
            asked for each of them.

    Returns:
        (the numbers, units of norms [rows, sources] where the launch has to find the scales itself, else
        None); None where the rows cannot be summed in one launch, or masks are not known as arrays.
    """
    division = _division(rule, values)
    if division is None:
        return None
    weights, sparsifier = values["weight"], rule.sparsifier
    units: Array | None = None
    if sparsifier is None:
        numbers = LaunchNumbers.blank(SumForm(MaskKind.DENSE, rule.elect_sign, division), *weights.shape)
        numbers.floats[..., WEIGHT] = weights
    else:
        assert rows is not None
        found = _sparse(rule, sparsifier, division, values, rows, keys)
        if found is None:
            return None
        numbers, units = found
        if units is not None and not finds_scales:
            units = None
            _ask_for_scales(numbers, rows)
    if division is Division.NUMBER:
        is_normalized = values["normalize"] != 0
        numbers.totals[:, DIVISOR] = np.where(is_normalized, _divisors(weights, rows is not None), 1.0)
    if "lambda" in values:
        numbers.totals[:, FACTOR] = values["lambda"]
    return numbers, units


def _division(rule: TaskVectorSum, values: Mapping[str, Array]) -> Division | None:
    """What all rows are divided by; None where they differ in kind."""
    is_normalized = values["normalize"] != 0
    if not is_normalized.any():
        return Division.NONE
    if not rule.elect_sign:
        return Division.NUMBER
    return Division.AGREEING if is_normalized.all() else None


def _divisors(weights: Array, is_based: bool) -> list[float]:
    """Correctly rounded sums of the weights of each row."""
    totals = [math.fsum(row) for row in weights.tolist()]
    return [1.0 if is_based and abs(total) < _NO_DIVISOR else total for total in totals]


def _sparse(
    rule: TaskVectorSum,
    sparsifier: Sparsifier,
    division: Division,
    values: Mapping[str, Array],
    rows: DifferenceRows,
    keys: MaskKeys | None,
) -> tuple[LaunchNumbers, Array | None] | None:
    masks, density, is_rescaled = sparsifier.masks, values["density"], values["rescale"] != 0
    if masks is None or is_rescaled.any() != is_rescaled.all():
        return None
    form = SumForm(masks.kind, rule.elect_sign, division, bool(is_rescaled.any()), masks.is_bounded)
    numbers = LaunchNumbers.blank(form, *rows.shape)
    keeps_none = (density <= 0) | ((rows.sizes == 0) & (density < 1))
    is_masked = ~keeps_none & (density < 1)
    norms = masks.write(numbers, rows, values, keys, is_masked)
    if masks.kind is MaskKind.BAND:  # bands of no element
        keeps_none |= is_masked & np.isinf(numbers.floats[..., LOW]) & np.isnan(numbers.floats[..., HIGH])
        is_masked &= ~keeps_none
    blank = LaunchNumbers.blank(form, 1, 1)
    numbers.floats[~is_masked] = blank.floats[0, 0]
    numbers.integers[~is_masked] = blank.integers[0, 0]
    numbers.floats[..., WEIGHT] = np.where(keeps_none, 0.0, values["weight"])
    if not form.is_scaled:
        return numbers, None
    scales = np.where(is_masked, rows.scales(norms), 1.0)
    if np.isnan(scales).any():
        return numbers, rows.units
    numbers.floats[..., SCALE] = scales
    return numbers, None


def _ask_for_scales(numbers: LaunchNumbers, rows: DifferenceRows) -> None:
    """Writes the scales of all sources, one by one."""
    for row, pairs in enumerate(rows.pairs):
        is_ranked = numbers.form.kind is MaskKind.RANKED
        ranks = [rows.tables.ranks(pair) if is_ranked and pair.n else None for pair in pairs]
        for i, summand in enumerate(numbers.weighted_sum(row, ranks).summands):
            if summand.kind is not MaskKind.DENSE:
                numbers.floats[row, i, SCALE] = rows.tables.scale(pairs[i], summand)


def write_bound(numbers: LaunchNumbers, columns: tuple[int, int], thresholds: Array, lasts: Array) -> None:
    """Writes a bound of bands of magnitudes.

    Args:
        numbers: Written.
        columns: LOW and LAST, or HIGH and HIGH_LAST; what holds beyond the last index is written too.
        thresholds: [rows, sources] float32 threshold up to the last index; NaN for none.
        lasts: [rows, sources] int64 last index at which it holds.
    """
    of_floats, of_integers = columns
    numbers.floats[..., of_floats] = thresholds
    numbers.floats[..., of_floats + 1] = next_float32(thresholds)
    numbers.integers[..., of_integers] = np.minimum(lasts, MOST)


def unknown_norms(rows: DifferenceRows) -> Array:
    """What a mask returns whose norms no table holds.

    Args:
        rows: The task vectors.

    Returns:
        [rows, sources] NaN.
    """
    return np.full(rows.shape, np.nan)


def split_words(mask_keys: Sequence[Sequence[int]]) -> Array:
    """Mask keys as `MaskKeys.words`.

    Args:
        mask_keys: [rows][sources] signed 64-bit numbers.

    Returns:
        [rows, sources, 2] int64 numbers in the range of int32, as `random_masks.split` gives them.
    """
    keys = np.array(mask_keys, np.int64).view(np.uint64)
    low = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    high = ((keys >> np.uint64(32)) | np.uint64(1)).astype(np.uint32).view(np.int32)
    return np.stack([low, high], axis=-1).astype(np.int64)
