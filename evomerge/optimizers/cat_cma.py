"""CatCMA (Hamano et al. 2024, arXiv 2405.09962) through cmaes: the only room that imports cmaes. Resumes by replay.

Categories and numbers are learnt together: a probability for each category of each gene, by natural gradient, and CMA-ES for
the rest. cmaes minimizes; ranks are negated once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizers.base import Array
from evomerge.optimizers.pending import GRID, PendingGenerations, ordered

_FREE = 2  # cmaes needs as many numbers: where there are fewer, genes that no one reads are added
_DEVIATIONS = (2 * GRID, 1e4)
"""Standard deviations along the principal axes are held between these: steps below the grid would be rounded to nothing and then
taken for huge ones, and those of genes without any effect wander."""
_REACH = (
    2.0  # an injected step is at most sqrt(n) + this long, in standard deviations (as in arXiv 1110.4181)
)


class CatCma:
    """CatCMA over leading categorical genes, whole numbers, and continuous ones after them. Satisfies `evomerge.optimizers.base.Optimizer`."""

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        categories: Sequence[int],
        stay: float,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        """start: [n], the categorical genes first; sigma: initial standard deviation > 0 of the continuous ones; categories: of
        each categorical gene, at least 2; stay: probability in (0, 1) of its start's category, the others share the rest
        alike, none less than the algorithm's margin; population: None for 4 + 3 ln n."""
        from cmaes import CatCMA

        self._counts = np.asarray(categories, dtype=np.int64)
        self._n = len(start)
        lead = len(self._counts)
        if (
            not lead
            or self._counts.min() < 2
            or lead > self._n
            or any(c not in range(k) for c, k in zip(start, categories, strict=False))
        ):
            raise ValueError(
                f"categorical genes come first and are whole numbers below {list(categories)}, got {list(start[:lead])}"
            )
        margin = (1 - 0.73 ** (1 / lead)) / (self._counts - 1)  # [lead], section 4.3 of the paper
        mean = np.zeros(max(_FREE, self._n - lead))
        mean[: self._n - lead] = start[lead:]
        self._cat = CatCMA(
            mean=mean,
            sigma=sigma,
            cat_num=self._counts,
            population_size=population or 4 + int(3 * math.log(max(2, self._n))),
            cat_param=self._probabilities(start, stay, margin),
            margin=margin,
            seed=seed,
        )
        self._injected: list[Sequence[float]] = []
        self._asked: PendingGenerations[tuple[Array, Array]] = (
            PendingGenerations()
        )  # each with its numbers, those that no one reads among them, and their mean

    def ask(self) -> Array:
        """[population, n] genomes: categories as whole numbers, the rest on a grid of 2**-14."""
        lead, size = len(self._counts), self._cat.population_size
        sampled = [self._cat.ask() for _ in range(size)]
        free = np.array([x for x, _ in sampled])  # [population, numbers]
        chosen = np.array([np.argmax(c, axis=1) for _, c in sampled], dtype=np.float64)  # [population, lead]
        injected, self._injected = self._injected[:size], []
        for slot, genome in enumerate(injected):
            chosen[slot] = genome[:lead]
            free[slot, : self._n - lead] = genome[lead:]
            free[slot] = self._shortened(free[slot])
        free = np.round(free / GRID) * GRID
        return self._asked.add(
            np.concatenate([chosen, free[:, : self._n - lead]], axis=1), (free, self._cat.mean.copy())
        )

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask`, categories as they are; longer steps of the numbers than the distribution would take
        are shortened. Raises ValueError for a category that there is not."""
        for genome in genomes:
            lead = [float(g) for g in genome[: len(self._counts)]]
            if len(genome) != self._n or any(
                c not in range(k) for c, k in zip(lead, self._counts.tolist(), strict=True)
            ):
                raise ValueError(
                    f"a genome has {self._n} genes, the first whole numbers below {self._counts.tolist()}, got {list(genome)}"
                )
        self._injected = [*self._injected, *genomes]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from a generation; of equal scores the earlier slot ranks first. Numbers move with their mean, as in `CmaEs`."""
        free, around = self._asked.told(genomes, scores)
        if not np.array_equal(around, self._cat.mean):
            free = free + (self._cat.mean - around)
        order = ordered(scores)
        told = [((free[slot], self._one_hot(genomes[slot])), float(rank)) for rank, slot in enumerate(order)]
        self._cat.tell(told)
        self._bound()
        return order[: self.mu]

    @property
    def mu(self) -> int:
        """How many of a generation's best are recombined."""
        return int(self._cat.population_size // 2)

    @property
    def mean(self) -> Array:
        """[n] the most likely category of each categorical gene, the first of equals, and the mean of the others, on the grid."""
        numbers = np.round(self._cat.mean[: self._n - len(self._counts)] / GRID) * GRID
        return np.concatenate([np.argmax(self.probabilities, axis=1).astype(np.float64), numbers])

    @property
    def probabilities(self) -> Array:
        """[categorical genes, most categories] probability of each category, 0 where a gene has fewer."""
        found: Array = np.array(self._cat._q, dtype=np.float64)  # the library shows it nowhere else
        return found

    def _probabilities(self, start: Sequence[float], stay: float, margin: Array) -> Array:
        """[categorical genes, most categories] of the first sample."""
        q = np.zeros((len(self._counts), int(self._counts.max())))
        for i, count in enumerate(self._counts):
            q[i, :count] = max((1 - stay) / (count - 1), margin[i])
            q[i, int(start[i])] = 0.0
            q[i, int(start[i])] = 1 - q[i].sum()
        return q

    def _one_hot(self, genome: Array) -> NDArray[np.bool_]:
        wanted: NDArray[np.bool_] = genome[: len(self._counts), None] == np.arange(int(self._counts.max()))
        return wanted

    def _bound(self) -> None:
        """Holds the normal distribution's deviations within `_DEVIATIONS`."""
        inner: Any = self._cat
        variances, axes = np.linalg.eigh(inner._C)
        least, most = ((d / inner._sigma) ** 2 for d in _DEVIATIONS)
        if variances.min() < least or variances.max() > most:
            inner._C = (axes * np.clip(variances, least, most)) @ axes.T
            inner._B = inner._D = None  # the library's decomposition of what was there before

    def _shortened(self, free: Array) -> Array:
        """A point no further from the mean than sqrt(n) + _REACH standard deviations."""
        inner: Any = self._cat
        step = free - inner._mean
        length = math.sqrt(float(step @ np.linalg.solve(inner._C, step))) / float(inner._sigma)
        found: Array = inner._mean + step * min(1.0, (math.sqrt(len(step)) + _REACH) / max(length, 1e-300))
        return found
