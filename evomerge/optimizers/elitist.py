"""(mu + lambda) evolution with re-evaluation (Beyer and Schwefel 2002), for mostly categorical genomes.

The survivors of a generation are evaluated again in the next one, beside their children, on whatever items
that one is scored on: a score that was high by chance does not last, and ranks are only ever compared within
a generation. Unlike a distribution with independent genes, a set of survivors holds several good combinations
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Array, OptimizerSettings, default_population
from evomerge.optimizers.pending import GRID, PendingGenerations, rank_order

_CROSSOVER_RATE = 0.3  # of the children have two parents
_NUMBER_MUTATION_RATE = 0.2  # of a child's continuous genes are moved
_RUN_MUTATION_RATE = (
    0.3  # of the children get one category over a run of genes, as hand-written blocks of layers do
)
_NEIGHBOUR_RATE = 0.5
"""Of a child's mutated genes take the category of a gene beside them that has as many categories: good
choices come in runs."""
_SURVIVOR_SHARE = 6  # one survivor for so many genomes of the population


class Elitist:
    """(mu + lambda) selection with crossover and mutation. Satisfies `evomerge.optimizers.base.Optimizer`.

        optimizer = Elitist([0.0] * 6, sigma=1.0, categories=[4] * 5, keep_probability=0.7, population=18)

    References:
        Beyer and Schwefel 2002, "Evolution strategies: a comprehensive introduction", Natural Computing 1.
    """

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        categories: Sequence[int],
        keep_probability: float,
        category_weights: Sequence[Sequence[float]] | None = None,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        """Begins with one survivor, the start.

        Args:
            start: [n], the categorical genes first.
            sigma: standard deviation of a mutation of the continuous genes.
            categories: how many categories each categorical gene has, at least 2; there is at least one such
                gene.
            keep_probability: that a child keeps a category: (1 - keep_probability) times the number of
                categorical genes is the expected number of mutations. A child mutates at least one gene, and
                some mutate a run of genes.
            category_weights: for each categorical gene, numbers above 0 that the probability of each category
                as a new one is proportional to; None for equal ones.
            population: genomes of a generation, a sixth of which survive; None for `default_population`.
            seed: of the random generator.
        """
        self._counts = np.asarray(categories, dtype=np.int64)
        self._sigma = sigma
        lead = len(self._counts)
        if category_weights is None:
            self._category_weights = [np.ones(int(count)) for count in self._counts]
        else:
            self._category_weights = [np.asarray(weights, dtype=np.float64) for weights in category_weights]
        # of each gene beside the one that every child mutates
        self._mutation_probability = max(0.0, (1 - keep_probability) * lead - 1) / max(1, lead - 1)
        self._population = population or default_population(len(start))
        self._rng = np.random.RandomState(seed)
        self._survivors: list[Array] = [np.round(np.asarray(start, dtype=np.float64) / GRID) * GRID]
        self._pending: PendingGenerations[None] = PendingGenerations()

    @classmethod
    def from_settings(cls, start: Sequence[float], settings: OptimizerSettings) -> Elitist:
        """The elitist optimizer from the settings that all optimizers share.

        Args:
            start: [n], the categorical genes first.
            settings: `diagonal` is not used.

        Returns:
            The optimizer.
        """
        return cls(
            start,
            settings.sigma,
            categories=settings.categories,
            keep_probability=settings.keep_probability,
            category_weights=settings.category_weights,
            population=settings.population,
            seed=settings.seed,
        )

    def ask(self) -> Array:
        """[population, n]: the survivors as they are, best first, then children; numbers on a grid of 2**-14.

        Children differ from the survivors and from each other, unless that takes too many draws. See
        `Optimizer.ask`.
        """
        survivors = self._survivors[: self._population]
        drawn = {tuple(genome) for genome in survivors}
        children: list[Array] = []
        while len(survivors) + len(children) < self._population:
            child = self._child()
            if tuple(child) not in drawn or len(drawn) > 4 * self._population:
                children.append(child)
            drawn.add(tuple(child))
        return self._pending.add(np.array([*survivors, *children]), None)

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes among the survivors of the next `ask`, before the start. See `Optimizer.inject`."""
        injected = [np.round(np.asarray(genome, dtype=np.float64) / GRID) * GRID for genome in genomes]
        distinct = {tuple(genome): genome for genome in [*injected, *self._survivors]}
        self._survivors = list(distinct.values())[: max(1, self._population // 2)]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Selects the best sixth as survivors; of equal scores the earlier slots, the previous ones.

        Equal genomes count once, with the rank of the worst of them. Where all failed, the survivors stay
        what they were. See `Optimizer.tell`.
        """
        self._pending.pop(genomes, scores)
        scored = [slot for slot in rank_order(scores) if scores[slot] is not None]
        slot_of_genome: dict[tuple[float, ...], int] = {}
        for slot in reversed(scored):
            slot_of_genome[tuple(genomes[slot])] = slot
        distinct = list(slot_of_genome.values())
        distinct.reverse()
        survivors = distinct[: self.mu]
        if survivors:
            self._survivors = [genomes[slot].copy() for slot in survivors]
        return survivors

    @property
    def mu(self) -> int:
        """How many of a generation survive."""
        return max(2, self._population // _SURVIVOR_SHARE)

    @property
    def mean(self) -> Array:
        """[n] the best survivor."""
        return self._survivors[0].copy()

    def _child(self) -> Array:
        """[n] a mutated copy of a survivor, or of two."""
        lead = len(self._counts)
        child = self._select_parent().copy()
        if self._rng.random_sample() < _CROSSOVER_RATE:
            self._cross(child)
        child[:lead] = self._mutated_categories(child[:lead])
        numbers = len(child) - lead
        if numbers:
            is_moved = self._rng.random_sample(numbers) < _NUMBER_MUTATION_RATE
            child[lead:] += np.where(is_moved, self._sigma * self._rng.standard_normal(numbers), 0.0)
        return np.asarray(np.round(child / GRID) * GRID, dtype=np.float64)

    def _cross(self, child: Array) -> None:
        """One-point crossover at the same relative place of the categories and of the numbers."""
        lead = len(self._counts)
        other = self._select_parent()
        place = self._rng.random_sample()
        for first, size in ((0, lead), (lead, len(child) - lead)):
            cut = first + round(place * size)
            child[cut : first + size] = other[cut : first + size]

    def _mutated_categories(self, categories: Array) -> Array:
        """[lead] categories of a child, at least one of them mutated."""
        rng, lead = self._rng, len(self._counts)
        is_mutated = rng.random_sample(lead) < self._mutation_probability
        is_mutated[rng.randint(lead)] = True
        proposals = self._proposals(categories)
        if rng.random_sample() < _RUN_MUTATION_RATE:
            first, last = sorted(rng.randint(lead, size=2))
            category = proposals[first]
            has_category = self._counts[first : last + 1] > category
            run = np.arange(first, last + 1)[has_category]
            proposals[run] = category
            is_mutated[:] = False
            is_mutated[run] = True
        return np.where(is_mutated, proposals, categories)

    def _proposals(self, categories: Array) -> Array:
        """[lead] what each gene would mutate to: a category at random, or that of a neighbour."""
        rng, lead = self._rng, len(self._counts)
        drawn = [self._other_category(gene, int(categories[gene])) for gene in range(lead)]
        proposals = np.array(drawn, dtype=np.float64)
        neighbours: NDArray[np.int64] = np.arange(lead) + np.where(rng.random_sample(lead) < 0.5, -1, 1)
        takes_neighbour = rng.random_sample(lead) < _NEIGHBOUR_RATE
        for gene in np.flatnonzero(takes_neighbour & (neighbours >= 0) & (neighbours < lead)):
            neighbour = neighbours[gene]
            same_choices = self._counts[gene] == self._counts[neighbour]
            if same_choices and categories[gene] != categories[neighbour]:
                proposals[gene] = categories[neighbour]
        return proposals

    def _other_category(self, gene: int, category: int) -> int:
        """A category of a gene other than this one, drawn by the gene's weights."""
        weights = self._category_weights[gene].copy()
        weights[category] = 0.0
        threshold = self._rng.random_sample() * weights.sum()
        return int(np.searchsorted(np.cumsum(weights), threshold, side="right"))

    def _select_parent(self) -> Array:
        """The better of two survivors drawn at random."""
        first, second = self._rng.randint(len(self._survivors), size=2)
        parent: Array = self._survivors[min(first, second)]
        return parent
