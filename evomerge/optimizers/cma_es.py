"""CMA-ES (Hansen 2016, arXiv 1604.00772) through pycma: the only room that imports cma. Resumes by replay.

pycma minimizes and uses numpy's global generator; both stay in here: scores are negated once, and the global
generator's state is swapped in and out around every call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from evomerge.optimizers.base import Array
from evomerge.optimizers.pending import GRID, PendingGenerations, ordered


class CmaEs:
    """CMA-ES in R^n. Satisfies `evomerge.optimizers.base.Optimizer`."""

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        population: int | None = None,
        diagonal: bool = False,
        seed: int = 0,
    ) -> None:
        """start: [n] initial mean, n >= 1; sigma: initial standard deviation > 0; population: None for 4 + 3 ln n."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma
        self._n = len(start)
        self._state = np.random.RandomState(seed).get_state()
        options = {
            "seed": math.nan,  # leave the generator alone: `_own_generator` holds it
            "popsize": population or 4 + int(3 * math.log(max(2, self._n))),
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
            "minstd": 2
            * GRID,  # steps below the grid would be rounded to nothing and then taken for huge ones
        }
        # pycma refuses n = 1: a second gene that no one reads makes it a plane
        x0 = np.zeros(max(2, self._n))
        x0[: self._n] = start
        with self._own_generator():
            self._es = cma.CMAEvolutionStrategy(x0, sigma, options)
        self._asked: PendingGenerations[tuple[Array, Array]] = (
            PendingGenerations()
        )  # each with the second gene that no one reads, and the mean it was drawn around

    def ask(self) -> Array:
        """[population, n] genomes on a grid of 2**-14."""
        with self._own_generator():
            x = np.asarray(self._es.ask(), dtype=np.float64)
        x = np.round(x / GRID) * GRID
        return self._asked.add(x[:, : self._n].copy(), (x, np.array(self._es.mean, dtype=np.float64)))

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the next `ask`; steps longer than the distribution would take are shortened."""
        padded = np.zeros((len(genomes), self._es.N))
        padded[:, : self._n] = genomes
        with self._own_generator():
            self._es.inject(list(padded))

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from a generation; of equal scores the earlier slot ranks first.

        Where the mean moved since the generation was asked its points move along: what is learnt is the steps that were
        taken. As they stand they would hold the last move too, which is then made again and again, and longer each time.
        """
        asked, around = self._asked.told(genomes, scores)
        if not np.array_equal(around, self._es.mean):
            asked = asked + (self._es.mean - around)
        order = ordered(scores)
        ranks = [0.0] * len(order)
        for rank, slot in enumerate(order):
            ranks[slot] = float(rank)
        with self._own_generator(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the points differ from those asked by the grid alone; unchecked, or pycma would shorten the longer ones
            self._es._flgtelldone = False  # it wants an ask before each tell: of two asked generations the second is told right after the first
            self._es.tell(list(asked), ranks, check_points=False)
        return order[: self.mu]

    @property
    def mu(self) -> int:
        """How many of a generation's best are recombined; of the others the active update learns where not to go."""
        return int(self._es.sp.weights.mu)

    @property
    def mean(self) -> Array:
        """[n] centre of the distribution, on the grid."""
        x: Array = np.asarray(self._es.mean, dtype=np.float64)[: self._n]
        return np.round(x / GRID) * GRID

    @property
    def deviations(self) -> Array:
        """[n] standard deviation of each gene under the distribution."""
        s: Array = np.asarray(self._es.stds, dtype=np.float64)[: self._n]
        return s

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        outer = np.random.get_state()
        np.random.set_state(self._state)
        try:
            yield
        finally:
            self._state = np.random.get_state()
            np.random.set_state(outer)
