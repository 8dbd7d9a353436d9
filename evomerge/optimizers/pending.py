"""What an optimizer was asked and not yet told of: usually one generation, two where the next is asked before the last straggler."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from evomerge.optimizers.base import Array

T = TypeVar("T")
GRID = (
    2.0**-14
)  # asked genomes are rounded to it, so that a replay is exact across BLAS kernels and thread counts


class PendingGenerations(Generic[T]):
    """Generations in the order they were asked, each with what its optimizer needs to learn from it."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Array, T]] = deque()

    def add(self, genomes: Array, more: T) -> Array:
        """Keeps a generation of [population, n] genomes, and returns them for the caller to do as it likes with."""
        self._waiting.append((genomes.copy(), more))
        return genomes

    def told(self, genomes: Array, scores: Sequence[float | None]) -> T:
        """What was kept with the oldest generation, which is done with. Raises ValueError unless the genomes are its own, with a
        finite score or None for each; then nothing is done with."""
        if (
            not self._waiting
            or not np.array_equal(self._waiting[0][0], genomes)
            or len(scores) != len(genomes)
        ):
            raise ValueError(
                "tell takes the genomes of the oldest ask that it was not told of, with a score for each"
            )
        if any(s is not None and not math.isfinite(s) for s in scores):
            raise ValueError("a score must be finite; tell None for a failed candidate")
        return self._waiting.popleft()[1]


def ordered(scores: Sequence[float | None]) -> list[int]:
    """Slots, best first; of equal scores the earlier, failed ones last."""
    return sorted(range(len(scores)), key=lambda i: (math.inf if (s := scores[i]) is None else -s, i))
