"""Generations that were asked and not yet told, and the order of scores.

Usually one generation is pending; two where the next one is asked before the last result of the one before
it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from evomerge.optimizers.base import Array

T = TypeVar("T")
GRID = 2.0**-14
"""Genomes are rounded to multiples of it, so that a replay is exact across BLAS kernels and thread counts."""


class PendingGenerations(Generic[T]):
    """Generations in the order they were asked, each with what its optimizer needs to learn from it."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Array, T]] = deque()

    def add(self, genomes: Array, context: T) -> Array:
        """Adds a generation as the newest one.

        Args:
            genomes: [population, n]; a copy is kept.
            context: what `pop` returns for this generation.

        Returns:
            The genomes themselves, for the caller to change as it likes.
        """
        self._pending.append((genomes.copy(), context))
        return genomes

    def pop(self, genomes: Array, scores: Sequence[float | None]) -> T:
        """Removes the oldest generation.

        Args:
            genomes: [population, n], equal to those of the oldest generation.
            scores: of each genome, finite or None.

        Returns:
            The context that the generation was added with.

        Raises:
            ValueError: where genomes or scores are not that; then nothing is removed.
        """
        is_oldest = bool(self._pending) and np.array_equal(self._pending[0][0], genomes)
        if not is_oldest or len(scores) != len(genomes):
            raise ValueError(
                "tell takes the genomes of the oldest ask that was not told yet, with a score for each"
            )
        if any(score is not None and not math.isfinite(score) for score in scores):
            raise ValueError("a score must be finite; tell None for a failed candidate")
        _, context = self._pending.popleft()
        return context


def rank_order(scores: Sequence[float | None]) -> list[int]:
    """Slots in the order of their scores.

    Args:
        scores: of each slot, higher is better; None is a failed candidate.

    Returns:
        Slots, best first; of equal scores the earlier slot first, failed ones last.
    """

    def key(slot: int) -> tuple[float, int]:
        score = scores[slot]
        return (math.inf if score is None else -score, slot)

    return sorted(range(len(scores)), key=key)
