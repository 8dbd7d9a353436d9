"""Random search: the first distribution of the other optimizers, sampled again and again. What learning has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.optimizers.base import Array
from evomerge.optimizers.pending import GRID, PendingGenerations


class RandomSearch:
    """Samples around the start and learns nothing. Satisfies `evomerge.optimizers.base.Optimizer`."""

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        population: int | None = None,
        seed: int = 0,
        categories: Sequence[int] = (),
        stay: float = 0.5,
    ) -> None:
        """start, sigma, population: as for `CmaEs`. categories: of each leading gene, at least 2: it keeps its start with the
        probability `stay`, and else is one of the others, all equally likely; the genes after them are normal."""
        self._start = np.round(np.asarray(start, dtype=np.float64) / GRID) * GRID
        self._sigma, self._stay = sigma, stay
        self._counts = np.asarray(categories, dtype=np.int64)
        self._popsize = population or 4 + int(3 * math.log(max(2, len(start))))
        self._rng = np.random.RandomState(seed)
        self._injected: list[Sequence[float]] = []
        self._asked: PendingGenerations[None] = PendingGenerations()

    def ask(self) -> Array:
        """[population, n] genomes on a grid of 2**-14."""
        leading = len(self._counts)
        x = self._start + self._sigma * self._rng.standard_normal((self._popsize, len(self._start)))
        stays = self._rng.random_sample((self._popsize, leading)) < self._stay
        steps = 1 + np.floor(self._rng.random_sample((self._popsize, leading)) * (self._counts - 1))
        x[:, :leading] = (self._start[:leading] + np.where(stays, 0, steps)) % self._counts
        injected, self._injected = self._injected[: self._popsize], []
        for slot, genome in enumerate(injected):
            x[slot] = genome
        return self._asked.add(np.round(x / GRID) * GRID, None)

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask` as they are, but for the grid."""
        self._injected = [*self._injected, *genomes]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns nothing: no slot is recombined."""
        self._asked.told(genomes, scores)
        return []

    @property
    def mu(self) -> int:
        """None of a generation is recombined."""
        return 0

    @property
    def mean(self) -> Array:
        """[n] the start."""
        return self._start.copy()
