"""CMA-ES (Hansen 2016, arXiv 1604.00772) through pycma; no other module imports cma. Resumes by replay.

pycma minimizes and uses numpy's global generator; neither shows outside this module: scores become ranks, 0
for the best, and the global generator's state is swapped in and out around every call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from evomerge.optimizers.base import Array, OptimizerSettings, default_population
from evomerge.optimizers.pending import GRID, PendingGenerations, rank_order


class CmaEs:
    """CMA-ES in R^n. Satisfies `evomerge.optimizers.base.Optimizer`.

        optimizer = CmaEs([0.0] * 6, sigma=0.1, population=12, seed=0)
        for _ in range(20):
            genomes = optimizer.ask()
            optimizer.tell(genomes, [score(genome) for genome in genomes])
        best = optimizer.mean

    References:
        Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772.
    """

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        population: int | None = None,
        diagonal: bool = False,
        seed: int = 0,
    ) -> None:
        """Begins with a normal distribution around a genome.

        Args:
            start: [n] initial mean, n at least 1.
            sigma: initial standard deviation of every gene, above 0.
            population: genomes of a generation; None for `default_population`.
            diagonal: learn a diagonal covariance matrix instead of a full one.
            seed: of the random generator.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma
        self._n = len(start)
        self._generator_state = np.random.RandomState(seed).get_state()
        options = {
            "seed": math.nan,  # leave the generator alone: `_own_generator` holds it
            "popsize": population or default_population(self._n),
            "CMA_diagonal": diagonal,
            "verbose": -9,
            "signals_filename": "",
            "tolfun": 0,
            "tolfunhist": 0,
            "tolx": 0,
            "tolflatfitness": math.inf,
            "tolstagnation": math.inf,
            "tolfacupx": math.inf,
            "tolconditioncov": math.inf,
            "maxiter": math.inf,
            # steps below the grid would be rounded to nothing and then taken for huge ones
            "minstd": 2 * GRID,
        }
        # pycma refuses n = 1: a second gene that no one reads makes it a plane
        mean = np.zeros(max(2, self._n))
        mean[: self._n] = start
        with self._own_generator():
            self._es = cma.CMAEvolutionStrategy(mean, sigma, options)
        # with each generation: its points, also a gene that no one reads, and the mean it was drawn around
        self._pending: PendingGenerations[tuple[Array, Array]] = PendingGenerations()

    @classmethod
    def from_settings(cls, start: Sequence[float], settings: OptimizerSettings) -> CmaEs:
        """CMA-ES from the settings that all optimizers share.

        Args:
            start: [n] initial mean.
            settings: what concerns categories is not used.

        Returns:
            The optimizer.
        """
        return cls(
            start,
            settings.sigma,
            population=settings.population,
            diagonal=settings.diagonal,
            seed=settings.seed,
        )

    def ask(self) -> Array:
        """[population, n] genomes on a grid of 2**-14. See `Optimizer.ask`."""
        with self._own_generator():
            points = np.asarray(self._es.ask(), dtype=np.float64)
        points = np.round(points / GRID) * GRID
        mean = np.array(self._es.mean, dtype=np.float64)
        return self._pending.add(points[:, : self._n].copy(), (points, mean))

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask`; steps longer than the distribution would take are shortened.

        See `Optimizer.inject`.
        """
        padded = np.zeros((len(genomes), self._es.N))
        padded[:, : self._n] = genomes
        with self._own_generator():
            self._es.inject(list(padded))

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from a generation; of equal scores the earlier slot ranks first. See `Optimizer.tell`.

        Where the mean moved since the generation was asked, its points move along: what is learnt are the
        steps that were taken. Unmoved, the points would hold the last move of the mean too, which would then
        be made again and again, and longer each time.
        """
        points, mean = self._pending.pop(genomes, scores)
        if not np.array_equal(mean, self._es.mean):
            points = points + (self._es.mean - mean)
        order = rank_order(scores)
        ranks = [0.0] * len(order)
        for rank, slot in enumerate(order):
            ranks[slot] = float(rank)
        with self._own_generator(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # pycma expects an ask before each tell: of two pending generations the second is told without one
            self._es._flgtelldone = False
            # the points differ from pycma's by the grid alone; with checks it would shorten the longer ones
            self._es.tell(list(points), ranks, check_points=False)
        return order[: self.mu]

    @property
    def mu(self) -> int:
        """How many of a generation's best are recombined; from the others it learns what to avoid."""
        return int(self._es.sp.weights.mu)

    @property
    def mean(self) -> Array:
        """[n] centre of the distribution, on the grid."""
        mean: Array = np.asarray(self._es.mean, dtype=np.float64)[: self._n]
        return np.round(mean / GRID) * GRID

    @property
    def deviations(self) -> Array:
        """[n] standard deviation of each gene under the distribution."""
        deviations: Array = np.asarray(self._es.stds, dtype=np.float64)[: self._n]
        return deviations

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        """Runs a call of pycma with this optimizer's state in numpy's global generator."""
        outer = np.random.get_state()
        np.random.set_state(self._generator_state)
        try:
            yield
        finally:
            self._generator_state = np.random.get_state()
            np.random.set_state(outer)
