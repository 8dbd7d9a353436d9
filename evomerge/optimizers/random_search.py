"""Random search: samples the other optimizers' initial distribution in every generation, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.optimizers.base import Array, OptimizerSettings, default_population
from evomerge.optimizers.pending import GRID, PendingGenerations


class RandomSearch:
    """Samples around the start and learns nothing. Satisfies `evomerge.optimizers.base.Optimizer`.

    optimizer = RandomSearch([0.0] * 6, sigma=0.3, population=12, seed=0)
    """

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        population: int | None = None,
        seed: int = 0,
        categories: Sequence[int] = (),
        keep_probability: float = 0.5,
    ) -> None:
        """Begins at a genome.

        Args:
            start: [n] centre of the samples, the categorical genes first; n is at least 1.
            sigma: standard deviation of the continuous genes, above 0.
            population: genomes of a generation; None for `default_population`.
            seed: of the random generator.
            categories: how many categories each leading gene has, at least 2; the genes after them are
                continuous.
            keep_probability: that a categorical gene keeps the start's category; else it is one of the
                others, all equally likely.
        """
        self._start = np.round(np.asarray(start, dtype=np.float64) / GRID) * GRID
        self._sigma = sigma
        self._keep_probability = keep_probability
        self._counts = np.asarray(categories, dtype=np.int64)
        self._population = population or default_population(len(start))
        self._rng = np.random.RandomState(seed)
        self._injected: list[Sequence[float]] = []
        self._pending: PendingGenerations[None] = PendingGenerations()

    @classmethod
    def from_settings(cls, start: Sequence[float], settings: OptimizerSettings) -> RandomSearch:
        """Random search from the settings that all optimizers share.

        Args:
            start: [n], the categorical genes first.
            settings: `diagonal` and `category_weights` are not used.

        Returns:
            The optimizer.
        """
        return cls(
            start,
            settings.sigma,
            population=settings.population,
            seed=settings.seed,
            categories=settings.categories,
            keep_probability=settings.keep_probability,
        )

    def ask(self) -> Array:
        """[population, n] genomes on a grid of 2**-14. See `Optimizer.ask`."""
        lead = len(self._counts)
        genomes = self._start + self._sigma * self._rng.standard_normal((self._population, len(self._start)))
        kept = self._rng.random_sample((self._population, lead)) < self._keep_probability
        steps = 1 + np.floor(self._rng.random_sample((self._population, lead)) * (self._counts - 1))
        genomes[:, :lead] = (self._start[:lead] + np.where(kept, 0, steps)) % self._counts
        for slot, genome in enumerate(self._injected[: self._population]):
            genomes[slot] = genome
        self._injected = []
        return self._pending.add(np.round(genomes / GRID) * GRID, None)

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask` as they are, but for the grid. See `Optimizer.inject`."""
        self._injected = [*self._injected, *genomes]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns nothing: no slot is recombined. See `Optimizer.tell`."""
        self._pending.pop(genomes, scores)
        return []

    @property
    def mu(self) -> int:
        """0: none of a generation is recombined."""
        return 0

    @property
    def mean(self) -> Array:
        """[n] the start."""
        return self._start.copy()
