"""Spearman's rank correlation in plain Python: of a few dozen candidates, where nothing heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlates the ranks of two lists of numbers; equal numbers share the mean of their ranks.

    Args:
        first: Finite numbers.
        second: As many.

    Returns:
        The correlation in [-1, 1]; None for fewer than two pairs, and where all numbers of a list are equal.

    Raises:
        ValueError: The lists differ in length.

    References:
        Spearman 1904, "The proof and measurement of association between two things".
    """
    if len(first) != len(second):
        raise ValueError(f"the lists need one length, got {len(first)} and {len(second)}")
    if len(first) < 2:
        return None
    a, b = _centred_ranks(first), _centred_ranks(second)
    squares = math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    if squares == 0:
        return None
    found = math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(squares)
    return max(-1.0, min(1.0, found))


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Ranks less their mean."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for i in order[first : last + 1]:
            ranks[i] = (first + last) / 2
        first = last + 1
    mean = (len(values) - 1) / 2
    return [rank - mean for rank in ranks]
