"""Elitist evolution with re-evaluation, for genomes that are mostly choices: a (mu + lambda) strategy (Beyer and Schwefel 2002).

The best of a generation are asked again in the next one, beside their changed copies, on whatever items that one is scored on:
luck does not last, and ranks are only ever compared within a generation. Unlike a distribution with a gene at a time, a set
of survivors holds several good combinations side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evomerge.optimizers.base import Array
from evomerge.optimizers.pending import GRID, PendingGenerations, ordered

_CROSSED = 0.3  # of the children have two parents
_SHIFTED = 0.2  # of a child's numbers are moved
_RUNS = 0.3  # of the children have one new choice over a run of genes, as blocks of layers are taken by hand
_SPREAD = (
    0.5  # of its changed choices are those of a gene beside them with as many: good choices come in runs
)


class Elitist:
    """Survivors and their changed copies. Satisfies `evomerge.optimizers.base.Optimizer`."""

    def __init__(
        self,
        start: Sequence[float],
        sigma: float,
        *,
        categories: Sequence[int],
        stay: float,
        likely: Sequence[Sequence[float]] | None = None,
        population: int | None = None,
        seed: int = 0,
    ) -> None:
        """start: [n], the categorical genes first; sigma: standard deviation of a step of the continuous ones; categories: of
        each categorical gene, at least 2; stay: probability that a child keeps a category, though one at least it changes, and
        some change a run; likely: of each categorical gene, what each category's probability as a new choice is proportional
        to, above 0, None for equal ones; population: None for 4 + 3 ln n; a sixth of it survive."""
        self._counts = np.asarray(categories, dtype=np.int64)
        self._sigma = sigma
        lead = len(self._counts)
        self._likely = (
            [np.asarray(own, dtype=np.float64) for own in likely]
            if likely is not None
            else [np.ones(int(k)) for k in self._counts]
        )
        self._further = max(0.0, (1 - stay) * lead - 1) / max(
            1, lead - 1
        )  # beside the one choice that every child changes
        self._popsize = population or 4 + int(3 * math.log(max(2, len(start))))
        self._rng = np.random.RandomState(seed)
        self._survivors: list[Array] = [np.round(np.asarray(start, dtype=np.float64) / GRID) * GRID]
        self._asked: PendingGenerations[None] = PendingGenerations()

    def ask(self) -> Array:
        """[population, n]: the survivors as they are, best first, then children; numbers on a grid of 2**-14."""
        kept = self._survivors[: self._popsize]
        known = {tuple(genome) for genome in kept}
        children: list[Array] = []
        while len(kept) + len(children) < self._popsize:
            child = self._child()
            if tuple(child) not in known or len(known) > 4 * self._popsize:
                children.append(child)
            known.add(tuple(child))
        return self._asked.add(np.array([*kept, *children]), None)

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes among the survivors that are asked next, before the start."""
        given = [np.round(np.asarray(g, dtype=np.float64) / GRID) * GRID for g in genomes]
        distinct = {tuple(g): g for g in [*given, *self._survivors]}
        self._survivors = list(distinct.values())[: max(1, self._popsize // 2)]

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """The best sixth survive; of equal scores the earlier, which were there before. Returns their slots, best first."""
        self._asked.told(genomes, scores)
        order = [i for i in ordered(scores) if scores[i] is not None]
        distinct = list({tuple(genomes[i]): i for i in reversed(order)}.values())[::-1]
        survivors = distinct[: self.mu]
        if survivors:
            self._survivors = [genomes[i].copy() for i in survivors]
        return survivors

    @property
    def mu(self) -> int:
        """How many of a generation survive."""
        return max(2, self._popsize // 6)

    @property
    def mean(self) -> Array:
        """[n] the best survivor."""
        return self._survivors[0].copy()

    def _child(self) -> Array:
        rng, lead = self._rng, len(self._counts)
        child = self._pick().copy()
        if (
            rng.random_sample() < _CROSSED
        ):  # what lies after one cut, of the choices and likewise of the numbers, is another's
            other, cut = self._pick(), rng.random_sample()
            for first, size in ((0, lead), (lead, len(child) - lead)):
                child[first + round(cut * size) : first + size] = other[
                    first + round(cut * size) : first + size
                ]
        changed = rng.random_sample(lead) < self._further
        changed[rng.randint(lead)] = True
        given = np.array([self._other(i, int(child[i])) for i in range(lead)], dtype=np.float64)
        beside = np.arange(lead) + np.where(rng.random_sample(lead) < 0.5, -1, 1)
        for i in np.flatnonzero((rng.random_sample(lead) < _SPREAD) & (beside >= 0) & (beside < lead)):
            if self._counts[i] == self._counts[beside[i]] and child[i] != child[beside[i]]:
                given[i] = child[beside[i]]
        if rng.random_sample() < _RUNS:  # one new choice, over a run of genes
            first, last = sorted(rng.randint(lead, size=2))
            run = np.arange(first, last + 1)[self._counts[first : last + 1] > given[first]]
            given[run], changed[:] = given[first], False
            changed[run] = True
        child[:lead] = np.where(changed, given, child[:lead])
        if lead < len(child):
            moved = rng.random_sample(len(child) - lead) < _SHIFTED
            child[lead:] += np.where(moved, self._sigma * rng.standard_normal(len(child) - lead), 0.0)
        return np.asarray(np.round(child / GRID) * GRID, dtype=np.float64)

    def _other(self, gene: int, now: int) -> int:
        """Another category of a gene than it has now."""
        p = self._likely[gene].copy()
        p[now] = 0.0
        return int(np.searchsorted(np.cumsum(p), self._rng.random_sample() * p.sum(), side="right"))

    def _pick(self) -> Array:
        """One of the survivors, a better one rather: of two, the better."""
        a, b = self._rng.randint(len(self._survivors), size=2)
        chosen: Array = self._survivors[min(a, b)]
        return chosen
