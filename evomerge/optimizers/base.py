"""Optimizers: arrays in, arrays out, higher scores are better. They know nothing of recipes or models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Optimizer(Protocol):
    """Ask for candidates, tell their scores. Deterministic: the same tells give the same asks."""

    def ask(self) -> Array:
        """[population, n] genomes of the next generation."""
        ...

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the first slots of the next `ask`, perhaps shortened."""
        ...

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from a generation in candidate order; None is a failed candidate and ranks last.

        Returns the slots that were recombined, best first.
        """
        ...

    @property
    def mu(self) -> int:
        """How many of a generation's best are recombined."""
        ...

    @property
    def mean(self) -> Array:
        """[n] centre of the search distribution."""
        ...
