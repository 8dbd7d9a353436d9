"""CatCMA (Hamano et al. 2024, arXiv 2405.09962) through cmaes; no other module imports cmaes.

It resumes by replay. Categories and numbers are learnt together: a probability for each category of each
gene, by natural gradient, and CMA-ES for the continuous genes. cmaes minimizes; it is given ranks, 0 for the
best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Array, OptimizerSettings, default_population
from evomerge.optimizers.pending import GRID, PendingGenerations, rank_order

_LEAST_NUMBERS = (
    2  # cmaes needs as many continuous genes: where there are fewer, genes that no one reads are added
)
_DEVIATIONS = (2 * GRID, 1e4)
"""Standard deviations along the principal axes are held between these: steps below the grid would be rounded
to nothing and then taken for huge ones, and those of genes without any effect wander."""
_LONGEST_STEP = 2.0
"""An injected step is at most sqrt(n) + this long, in standard deviations (Hansen 2011, arXiv 1110.4181)."""


class CatCma:
    """CatCMA over leading categorical genes and continuous ones after them. Satisfies `base.Optimizer`.

        optimizer = CatCma([0.0] * 6, sigma=1.0, categories=[4, 4, 3], keep_probability=0.75)

    References:
        Hamano et al. 2024, "CatCMA: Stochastic Optimization for Mixed-Category Problems", arXiv 2405.09962.
    """

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        categories: Sequence[int],
        keep_probability: float,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        """Begins with a distribution around a genome.

        Args:
            start: [n], the categorical genes first, each a whole number below its count of categories.
            sigma: initial standard deviation of the continuous genes, above 0.
            categories: how many categories each categorical gene has, at least 2; there is at least one such
                gene.
            keep_probability: in (0, 1), initial probability of the start's category; the others share the
                rest equally, none less than the algorithm's margin.
            population: genomes of a generation; None for `default_population`.
            seed: of the random generator.

        Raises:
            ValueError: where the categorical genes of the start are none of their categories.
        """
        from cmaes import CatCMA

        self._counts = np.asarray(categories, dtype=np.int64)
        self._n = len(start)
        lead = len(self._counts)
        if not lead or self._counts.min() < 2 or lead > self._n or not _are_categories(start, categories):
            raise ValueError(
                f"categorical genes come first and are whole numbers below {list(categories)}, "
                f"got {list(start[:lead])}"
            )
        margin = (1 - 0.73 ** (1 / lead)) / (self._counts - 1)  # [lead], section 4.3 of the paper
        mean = np.zeros(max(_LEAST_NUMBERS, self._n - lead))
        mean[: self._n - lead] = start[lead:]
        self._cat = CatCMA(
            mean=mean,
            sigma=sigma,
            cat_num=self._counts,
            population_size=population or default_population(self._n),
            cat_param=self._initial_probabilities(start, keep_probability, margin),
            margin=margin,
            seed=seed,
        )
        self._injected: list[Sequence[float]] = []
        # with each generation: its numbers, also those that no one reads, and the mean it was drawn around
        self._pending: PendingGenerations[tuple[Array, Array]] = PendingGenerations()

    @classmethod
    def from_settings(cls, start: Sequence[float], settings: OptimizerSettings) -> CatCma:
        """CatCMA from the settings that all optimizers share.

        Args:
            start: [n], the categorical genes first.
            settings: `diagonal` and `category_weights` are not used.

        Returns:
            The optimizer.
        """
        return cls(
            start,
            settings.sigma,
            categories=settings.categories,
            keep_probability=settings.keep_probability,
            population=settings.population,
            seed=settings.seed,
        )

    def ask(self) -> Array:
        """[population, n] genomes: whole numbers, then numbers on a grid of 2**-14. See `Optimizer.ask`."""
        lead, population = len(self._counts), self._cat.population_size
        sampled = [self._cat.ask() for _ in range(population)]
        numbers = np.array([x for x, _ in sampled])  # [population, continuous genes]
        one_hot = [category for _, category in sampled]
        chosen = np.array([np.argmax(c, axis=1) for c in one_hot], dtype=np.float64)  # [population, lead]
        for slot, genome in enumerate(self._injected[:population]):
            chosen[slot] = genome[:lead]
            numbers[slot, : self._n - lead] = genome[lead:]
            numbers[slot] = self._shortened(numbers[slot])
        self._injected = []
        numbers = np.round(numbers / GRID) * GRID
        genomes = np.concatenate([chosen, numbers[:, : self._n - lead]], axis=1)
        return self._pending.add(genomes, (numbers, self._cat.mean.copy()))

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask`, categories as they are; long steps of the numbers are shortened.

        Args:
            genomes: each of n genes, the categorical ones first.

        Raises:
            ValueError: for a genome of another length, or with a category that does not exist.
        """
        counts = self._counts.tolist()
        for genome in genomes:
            if len(genome) != self._n or not _are_categories(genome, counts):
                raise ValueError(
                    f"a genome has {self._n} genes, the first whole numbers below {counts}, "
                    f"got {list(genome)}"
                )
        self._injected = [*self._injected, *genomes]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from a generation; of equal scores the earlier slot ranks first. See `Optimizer.tell`.

        Numbers move with their mean, as in `CmaEs`.
        """
        numbers, mean = self._pending.pop(genomes, scores)
        if not np.array_equal(mean, self._cat.mean):
            numbers = numbers + (self._cat.mean - mean)
        order = rank_order(scores)
        self._cat.tell(
            [((numbers[slot], self._one_hot(genomes[slot])), float(rank)) for rank, slot in enumerate(order)]
        )
        self._bound_deviations()
        return order[: self.mu]

    @property
    def mu(self) -> int:
        """How many of a generation's best are recombined."""
        return int(self._cat.population_size // 2)

    @property
    def mean(self) -> Array:
        """[n] the most likely category of each categorical gene, and the mean of the other genes.

        Of equally likely categories the first; the numbers are on the grid.
        """
        numbers = np.round(self._cat.mean[: self._n - len(self._counts)] / GRID) * GRID
        return np.concatenate([np.argmax(self.probabilities, axis=1).astype(np.float64), numbers])

    @property
    def probabilities(self) -> Array:
        """[categorical genes, most categories] probability of each category, 0 where a gene has fewer."""
        probabilities: Array = np.array(
            self._cat._q, dtype=np.float64
        )  # the library has no public name for it
        return probabilities

    def _initial_probabilities(self, start: Sequence[float], keep_probability: float, margin: Array) -> Array:
        """[categorical genes, most categories] of the first sample."""
        probabilities = np.zeros((len(self._counts), int(self._counts.max())))
        for gene, count in enumerate(self._counts):
            category = int(start[gene])
            probabilities[gene, :count] = max((1 - keep_probability) / (count - 1), margin[gene])
            probabilities[gene, category] = 0.0
            probabilities[gene, category] = 1 - probabilities[gene].sum()
        return probabilities

    def _one_hot(self, genome: Array) -> NDArray[np.bool_]:
        """[categorical genes, most categories] whether a genome has the category."""
        lead = len(self._counts)
        is_category: NDArray[np.bool_] = genome[:lead, None] == np.arange(int(self._counts.max()))
        return is_category

    def _bound_deviations(self) -> None:
        """Holds the normal distribution's deviations within `_DEVIATIONS`."""
        inner: Any = self._cat
        variances, axes = np.linalg.eigh(inner._C)
        least, most = ((deviation / inner._sigma) ** 2 for deviation in _DEVIATIONS)
        if variances.min() < least or variances.max() > most:
            inner._C = (axes * np.clip(variances, least, most)) @ axes.T
            inner._B = inner._D = None  # the library's decomposition of the previous matrix

    def _shortened(self, numbers: Array) -> Array:
        """A point no further from the mean than sqrt(n) + _LONGEST_STEP standard deviations."""
        inner: Any = self._cat
        step = numbers - inner._mean
        length = math.sqrt(float(step @ np.linalg.solve(inner._C, step))) / float(inner._sigma)
        longest = math.sqrt(len(step)) + _LONGEST_STEP
        shortened: Array = inner._mean + step * min(1.0, longest / max(length, 1e-300))
        return shortened


def _are_categories(genome: Sequence[float], counts: Sequence[int]) -> bool:
    """Whether the leading genes are whole numbers below their counts."""
    return all(float(gene) in range(count) for gene, count in zip(genome, counts, strict=False))
