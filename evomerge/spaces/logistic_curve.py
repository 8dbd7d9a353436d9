"""A logistic curve between genes in R and values in an open interval, with a start value at gene 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MAX_LOGIT = 700.0  # beyond it exp overflows


@dataclass(frozen=True, slots=True)
class LogisticCurve:
    """A smooth, monotone map from R onto (low, high), so that no gene gives a value outside the bounds.

    Attributes:
        low: Lower bound of a value.
        high: Upper bound of a value, above `low`.
        start: Value of gene 0, between the bounds.
        slope: By how much one unit of gene moves a value near `start`; None for `high - low`.
    """

    low: float
    high: float
    start: float
    slope: float | None = None

    def value(self, gene: float) -> float:
        """The value of a gene.

        Args:
            gene: Any finite number.

        Returns:
            A value in [low, high]; a bound is reached where the difference is below the precision of a float.
        """
        start = self._fraction(self.start)
        scale, slope = self._scale_and_slope()
        logit = _logit(start) + gene * slope / (scale * start * (1 - start))
        logit = max(-_MAX_LOGIT, min(_MAX_LOGIT, logit))
        return self.low + (self.high - self.low) / (1 + math.exp(-logit))

    def gene(self, value: float, margin: float) -> float:
        """The gene of a value, the inverse of `value`.

        Args:
            value: Any number; one outside the bounds, or on them, is moved just inside.
            margin: How far inside at least, as a fraction of the interval, in (0, 0.5).

        Returns:
            The gene.
        """
        start = self._fraction(self.start)
        fraction = min(1 - margin, max(margin, self._fraction(value)))
        scale, slope = self._scale_and_slope()
        return (_logit(fraction) - _logit(start)) * scale * start * (1 - start) / slope + 0.0

    def _fraction(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def _scale_and_slope(self) -> tuple[float, float]:
        """(unit, slope in that unit) of values; (1, 1) where the unit is the interval itself."""
        if self.slope is None:
            return 1.0, 1.0
        return self.high - self.low, self.slope


def _logit(fraction: float) -> float:
    return math.log(fraction / (1 - fraction))
