"""The numbers of one candidate for a `TensorTable`: what each row's weighted sum is, as three arrays.

`LaunchNumbers.of` writes them from `WeightedSum`s, row by row; a search fills the arrays for all rows at
once, by the conventions below, and gets the same numbers.

Of floats[row, source] (float32):

| column | meaning |
| --- | --- |
| WEIGHT | the source's weight; 0, with everything kept, for a source of which nothing is kept |
| SCALE | factor that restores the norm; 1 without |
| LOW, LOW_AFTER | BAND: smallest magnitude that is kept, up to index LAST and beyond it |
| HIGH, HIGH_AFTER | BAND: magnitude from which on nothing is kept, up to HIGH_LAST and beyond; NaN: none |
| P_LOW, P_STEP | RANKED: probability of an element of rank r is P_LOW + r * P_STEP |

Of integers[row, source] (int32):

| column | meaning |
| --- | --- |
| KEY, ODD | RANDOM, RANKED: the mask key, see `random_masks.split` |
| BOUND | RANDOM keeps elements whose hash is at most this |
| LAST, HIGH_LAST | BAND: the last index at which LOW and HIGH hold; MOST for all indices, -1 for none |

Everything is kept by LOW = LOW_AFTER = -1 (BAND), BOUND = MOST (RANDOM), P_LOW = 2 and P_STEP = 0 (RANKED).
LOW_AFTER and HIGH_AFTER are the float32 numbers after LOW and HIGH (`next_float32`). totals[row] (float32)
are DIVISOR and FACTOR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused.weighted_sum import TOP_NONE, MaskKind, Summand, TopK, WeightedSum

Array = np.ndarray[Any, np.dtype[Any]]
WEIGHT, SCALE, LOW, LOW_AFTER, HIGH, HIGH_AFTER, P_LOW, P_STEP = range(8)
KEY, ODD, BOUND, LAST, HIGH_LAST = range(5)
DIVISOR, FACTOR = range(2)
FLOATS, INTEGERS, TOTALS = 8, 5, 2
MOST = (1 << 31) - 1
LEAST = -(1 << 31)


class Division(IntEnum):
    """What a sum is divided by.

    Attributes:
        NONE: Nothing.
        NUMBER: The row's divisor (1 allowed).
        AGREEING: The weights that agree in sign at each element (1 where they are 0 but for rounding).
    """

    NONE = 0
    NUMBER = 1
    AGREEING = 2


@dataclass(frozen=True, slots=True)
class SumForm:
    """What all rows of a launch have in common: a kernel is compiled for each form.

    Attributes:
        kind: The masks of all sources.
        elect_sign: As in `WeightedSum`.
        division: What sums are divided by.
        is_scaled: Whether scales are applied; without it every scale must be 1.
        is_bounded: Whether bands may have an upper bound; without it every HIGH must be NaN.
    """

    kind: MaskKind
    elect_sign: bool = False
    division: Division = Division.NONE
    is_scaled: bool = False
    is_bounded: bool = False

    @classmethod
    def of(cls, sums: Sequence[WeightedSum]) -> SumForm | None:
        """The narrowest form that all the sums have.

        Args:
            sums: At least one.

        Returns:
            The form; None where kinds of masks are mixed, or some sums elect signs and others do not.
        """
        summands = [summand for total in sums for summand in total.summands]
        kinds = {s.kind for s in summands if not keeps_nothing(s)} - {MaskKind.DENSE}
        divisions = {_division(total) for total in sums}
        if len(kinds) > 1 or len({total.elect_sign for total in sums}) > 1:
            return None
        if Division.AGREEING in divisions and len(divisions) > 1:
            return None
        return cls(
            kinds.pop() if kinds else MaskKind.DENSE,
            sums[0].elect_sign,
            max(divisions),
            any(s.scale != 1 for s in summands),
            any(s.outer is not None for s in summands if s.kind is MaskKind.BAND),
        )


@dataclass(frozen=True, slots=True)
class LaunchNumbers:
    """What is summed in each row of a table.

    Attributes:
        form: Common to all rows.
        floats: [rows, sources, FLOATS] float32.
        integers: [rows, sources, INTEGERS] int32.
        totals: [rows, TOTALS] float32.
    """

    form: SumForm
    floats: Array
    integers: Array
    totals: Array

    @classmethod
    def blank(cls, form: SumForm, rows: int, sources: int) -> LaunchNumbers:
        """Numbers by which every element is kept, of weight 0, scale 1, divisor 1 and factor 1.

        Args:
            form: Common to all rows.
            rows: Number of rows.
            sources: Number of sources of each.

        Returns:
            Arrays to be filled.
        """
        everything = [0.0, 1.0, -1.0, -1.0, math.nan, math.nan, 2.0, 0.0]
        floats = np.tile(np.array(everything, np.float32), (rows, sources, 1))
        integers = np.tile(np.array([0, 1, MOST, MOST, MOST], np.int32), (rows, sources, 1))
        return cls(form, floats, integers, np.ones((rows, TOTALS), np.float32))

    @classmethod
    def of(cls, sums: Sequence[WeightedSum], form: SumForm | None = None) -> LaunchNumbers:
        """The numbers of a sum for each row.

        Args:
            sums: One per row, each with one summand per source.
            form: A form that all have, wider than necessary at most; None for the narrowest.

        Returns:
            The numbers.

        Raises:
            ValueError: No form fits all the sums.
        """
        narrowest = SumForm.of(sums)
        if narrowest is None:
            raise ValueError("one launch sums in one way: kinds of masks or of division are mixed")
        numbers = cls.blank(form or narrowest, len(sums), len(sums[0].summands))
        for row, total in enumerate(sums):
            numbers.totals[row] = (1.0 if total.divisor is None else total.divisor, total.factor)
            for i, summand in enumerate(total.summands):
                _write(numbers, (row, i), summand)
        return numbers

    def weighted_sum(self, row: int, ranks: Sequence[Tensor | None] | None = None) -> WeightedSum:
        """The sum of one row, for kernels that know no tables.

        Args:
            row: Number of the row.
            ranks: [sources]: ranks for RANKED masks.

        Returns:
            A sum with the same result, bit for bit.
        """
        sources = range(self.floats.shape[1])
        summands = tuple(self._summand(row, i, None if ranks is None else ranks[i]) for i in sources)
        agreeing = self.form.division is Division.AGREEING
        divisor = None if agreeing else float(self.totals[row, DIVISOR])
        return WeightedSum(summands, self.form.elect_sign, divisor, float(self.totals[row, FACTOR]))

    def on_device(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Copies the numbers to a device, in one copy that the device need not have done on return.

        Args:
            device: Where a launch runs.

        Returns:
            `floats`, `integers` and `totals` there, each at a multiple of 16 bytes.
        """
        parts = [self.floats.view(np.int32), self.integers, self.totals.view(np.int32)]
        starts = np.cumsum([0, *(-(-part.size // 4) * 4 for part in parts)])
        on_host = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
        flat = on_host.numpy()
        for part, start in zip(parts, starts, strict=False):
            flat[start : start + part.size] = part.reshape(-1)
        there = on_host.to(device, non_blocking=True)
        views = [
            there[start : start + part.size].view(part.shape)
            for part, start in zip(parts, starts.tolist(), strict=False)
        ]
        return views[0].view(torch.float32), views[1], views[2].view(torch.float32)

    def _summand(self, row: int, i: int, ranks: Tensor | None) -> Summand:
        f, k = self.floats[row, i].tolist(), self.integers[row, i].tolist()
        kind, key, plain = self.form.kind, (k[KEY], k[ODD]), Summand(MaskKind.DENSE, f[WEIGHT], f[SCALE])
        if kind is MaskKind.BAND and (f[LOW] >= 0 or not math.isnan(f[HIGH])):
            outer = None if math.isnan(f[HIGH]) else TopK(f[HIGH], k[HIGH_LAST], 0)
            return Summand(kind, f[WEIGHT], f[SCALE], TopK(f[LOW], k[LAST], 0), outer)
        if kind is MaskKind.RANDOM and k[BOUND] < MOST:
            return Summand(kind, f[WEIGHT], f[SCALE], key=key, bound=k[BOUND] + 1)
        if kind is MaskKind.RANKED and (f[P_STEP] != 0 or f[P_LOW] < 1):
            return Summand(kind, f[WEIGHT], f[SCALE], key=key, ranks=ranks, low=f[P_LOW], step=f[P_STEP])
        return plain


def next_float32(x: Array) -> Array:
    """The float32 numbers after those of an array, as LOW_AFTER is after LOW.

    Args:
        x: float32 numbers of any shape, none negative; infinity stays.

    Returns:
        float32 of the same shape.
    """
    after: Array = np.nextafter(x.astype(np.float32), np.float32(np.inf))
    return after


def _division(total: WeightedSum) -> Division:
    if total.divisor is None:
        return Division.AGREEING if total.elect_sign else Division.NONE
    return Division.NONE if total.divisor == 1 else Division.NUMBER


def keeps_nothing(summand: Summand) -> bool:
    """Whether a summand is that of density 0.

    Args:
        summand: Any.

    Returns:
        True where it keeps no element.
    """
    return summand.kind is MaskKind.BAND and summand.outer is None and summand.inner == TOP_NONE


def _write(numbers: LaunchNumbers, place: tuple[int, int], summand: Summand) -> None:
    """Writes a summand into arrays that say: everything is kept."""
    floats, integers, kind = numbers.floats[place], numbers.integers[place], summand.kind
    if keeps_nothing(summand):
        return
    floats[[WEIGHT, SCALE]] = summand.weight, summand.scale
    if kind is MaskKind.BAND:
        floats[[LOW, LOW_AFTER]], integers[LAST] = _bound(summand.inner)
        if summand.outer is not None:
            floats[[HIGH, HIGH_AFTER]], integers[HIGH_LAST] = _bound(summand.outer)
    elif kind is MaskKind.RANDOM:
        none = (0, 0, -1)  # every hash is 0, above the bound
        given = (*summand.key, summand.bound - 1)
        integers[[KEY, ODD, BOUND]] = none if summand.bound <= LEAST else given
    elif kind is MaskKind.RANKED:
        integers[[KEY, ODD]], floats[[P_LOW, P_STEP]] = summand.key, (summand.low, summand.step)


def _bound(top: TopK) -> tuple[tuple[float, float], int]:
    """(threshold up to the last index, threshold beyond it), the last index."""
    threshold = np.float32(top.threshold)
    return (float(threshold), float(np.nextafter(threshold, np.float32(np.inf)))), min(top.last, MOST)
