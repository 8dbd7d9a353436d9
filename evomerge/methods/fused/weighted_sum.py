"""What one pass over a tensor computes: one `Summand` per source, and how they are summed."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor


class MaskKind(IntEnum):
    """Which elements of a difference x - base a summand keeps; the numbers are those of `one_pass.c`.

    Attributes:
        DENSE: All of them.
        BAND: A band of magnitudes.
        RANDOM: A random part, the same probability for every element.
        RANKED: A random part, with a probability that grows with the element's rank in its row.
    """

    DENSE = 0
    BAND = 1
    RANDOM = 2
    RANKED = 3


@dataclass(frozen=True, slots=True)
class TopK:
    """The k elements of largest magnitude: those above a threshold, and of those equal to it the first ones.

    Attributes:
        threshold: Magnitude of the k-th largest element.
        last: Index of the last of the elements equal to `threshold` that belong.
        count: k.
    """

    threshold: float
    last: int
    count: int

    def least_magnitude(self, index: int) -> float:
        """The smallest magnitude that belongs, for elements at and after an index on one side of `last`.

        Args:
            index: Index of the first element.

        Returns:
            The threshold itself up to `last`, beyond it the next float32.
        """
        return self.threshold if index <= self.last else _next_float32(self.threshold)


TOP_NONE = TopK(math.inf, -1, 0)
"""No element."""


@dataclass(frozen=True, slots=True)
class Summand:
    """A source's part in the sum: weight * scale * (the elements of x - base that are kept).

    Attributes:
        kind: Which elements are kept.
        weight: The source's weight.
        scale: Factor that restores the norm of what a mask leaves over; 1 without rescaling.
        inner: BAND keeps these elements of largest magnitude ...
        outer: ... less these; None for no upper bound.
        key: Key of RANDOM and RANKED masks: (bits to mix in, odd factor), both signed 32-bit.
        bound: RANDOM keeps elements whose hash is below it, in [-2**31, 2**31).
        ranks: [n] uint16 (int32 for rows beyond 65536 elements): rank of each element by magnitude in its
            row.
        low: RANKED keeps an element with the probability low + rank * step ...
        step: ... the growth of that probability for each rank.
    """

    kind: MaskKind
    weight: float
    scale: float = 1.0
    inner: TopK = TOP_NONE
    outer: TopK | None = None
    key: tuple[int, int] = (0, 1)
    bound: int = 0
    ranks: Tensor | None = None
    low: float = 0.0
    step: float = 0.0

    @property
    def mask(self) -> Hashable:
        """What its mask depends on besides the two tensors: equal values mean equal masks."""
        return (self.kind, self.key, self.bound, self.inner, self.outer, self.low, self.step)

    def cuts(self) -> tuple[int, ...]:
        """Indices at which a threshold changes."""
        bounds = (self.inner, self.outer) if self.kind is MaskKind.BAND else ()
        return tuple(top.last + 1 for top in bounds if top is not None)

    def numbers(self, start: int) -> tuple[float, ...]:
        """The numbers that a kernel needs for the elements from an index to the next cut.

        Args:
            start: Index of the first element.

        Returns:
            weight, scale, least and upper magnitude (NaN for no upper bound), low and step of the
            probability.
        """
        upper = math.nan if self.outer is None else self.outer.least_magnitude(start)
        return (self.weight, self.scale, self.inner.least_magnitude(start), upper, self.low, self.step)


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """How summands become a tensor: base + factor * sum / divisor.

    Attributes:
        summands: One per source, in their order.
        elect_sign: At each element sum only the summands that have the sign of the sum.
        divisor: A number, or None for the sum of the weights that agree (with `elect_sign`; 0 but for
            rounding counts as 1).
        factor: What the sum is multiplied by.
    """

    summands: tuple[Summand, ...]
    elect_sign: bool = False
    divisor: float | None = 1.0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A source's tensor and the base's.

    Attributes:
        base: The base's tensor.
        source: The source's tensor, of the same shape.
        id: What its magnitudes are cached under; None for never cached.
    """

    base: Tensor
    source: Tensor
    id: Hashable = None

    @property
    def n(self) -> int:
        """Number of elements."""
        return self.base.numel()

    @property
    def width(self) -> int:
        """Number of elements of a row (last axis); 1 for a scalar."""
        return self.base.shape[-1] if self.base.dim() else 1


def _next_float32(x: float) -> float:
    """The float32 after x >= 0."""
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))
