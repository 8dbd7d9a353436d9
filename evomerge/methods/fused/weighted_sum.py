"""What one pass over a tensor does: one `Summand` per source, and how the shares are summed. Knows nothing of how it is run."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor


class MaskKind(IntEnum):
    """Which elements of a difference x - base are kept; the numbers are those of `one_pass.c`."""

    DENSE = 0
    BAND = 1
    RANDOM = 2
    RANKED = 3


@dataclass(frozen=True, slots=True)
class TopK:
    """The k elements of largest magnitude: those above `threshold`, and those equal to it up to index `last`."""

    threshold: float
    last: int

    def before(self, index: int) -> float:
        """Smallest magnitude that belongs to them for elements at and after `index`, on one side of `last`."""
        return self.threshold if index <= self.last else _next(self.threshold)


NOTHING = TopK(math.inf, -1)


@dataclass(frozen=True, slots=True)
class Summand:
    """A source's part in the sum: weight * scale * (what is kept of x - base).

    inner: BAND keeps these largest elements, less those of `outer`. key: (bits to mix in, odd factor) of RANDOM and
    RANKED masks, signed 32-bit; bound: RANDOM keeps what hashes below it, in [-2**31, 2**31). ranks: uint16, the rank
    of each element by magnitude in its row; RANKED keeps with probability low + rank * step.
    """

    kind: MaskKind
    weight: float
    scale: float = 1.0
    inner: TopK = NOTHING
    outer: TopK | None = None
    key: tuple[int, int] = (0, 1)
    bound: int = 0
    ranks: Tensor | None = None
    low: float = 0.0
    step: float = 0.0

    def cuts(self) -> tuple[int, ...]:
        """Indices at which a threshold changes."""
        levels = (self.inner, self.outer) if self.kind is MaskKind.BAND else ()
        return tuple(level.last + 1 for level in levels if level is not None)

    def numbers(self, start: int) -> tuple[float, ...]:
        """weight, scale, low and high magnitude, low and step of the probability, from index `start` to the next cut."""
        high = math.nan if self.outer is None else self.outer.before(start)
        return (self.weight, self.scale, self.inner.before(start), high, self.low, self.step)


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """How shares become a tensor: base + factor * sum / divisor.

    elect: only what has the sign of the sum counts. divisor: a number, or None for the sum of the weights that
    agree (with `elect`; 0 but for rounding counts as 1).
    """

    shares: tuple[Summand, ...]
    elect: bool = False
    divisor: float | None = 1.0
    factor: float = 1.0


def _next(x: float) -> float:
    """The float32 after x >= 0."""
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A parent's tensor and its base's. id: what it is remembered by; None is never remembered."""

    base: Tensor
    source: Tensor
    id: Hashable = None

    @property
    def n(self) -> int:
        """Number of elements."""
        return self.base.numel()
