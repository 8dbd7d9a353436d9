"""The ask-and-tell protocol of optimizers, their settings, and two rules that depend on the genes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_EVALUATIONS_PER_GENE = 20  # from which on a full covariance matrix is worth learning


class Optimizer(Protocol):
    """Proposes genomes and learns from the order of their scores; higher scores are better.

    Deterministic: the same settings and the same sequence of calls give the same genomes, whatever else draws
    from numpy's global generator. A search resumes by replaying the stored scores.

        genomes = optimizer.ask()
        recombined = optimizer.tell(genomes, [score(genome) for genome in genomes])
    """

    def ask(self) -> Array:
        """Genomes of the next generation, of shape [population, n]. The caller may change the array."""
        ...

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Puts genomes into the first slots of the next `ask`.

        Args:
            genomes: each of n genes. An optimizer may shorten a step that is longer than its distribution
                would take.
        """
        ...

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        """Learns from the oldest generation that was asked and not yet told.

        Args:
            genomes: [population, n], as `ask` returned them.
            scores: of each genome in the same order, finite; None is a failed candidate and ranks last.

        Returns:
            The slots that were recombined, best first.

        Raises:
            ValueError: where the genomes are not those of the oldest generation, or a score is not finite.
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


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """Everything that optimizers can be made with; each takes what it needs.

    Attributes:
        sigma: initial standard deviation of the continuous genes, above 0.
        population: genomes of a generation; None for `default_population`.
        seed: of the optimizer's own random generator.
        diagonal: whether CMA-ES learns a diagonal covariance matrix instead of a full one.
        categories: how many categories each of the leading categorical genes has, each at least 2.
        keep_probability: in (0, 1), that a categorical gene keeps the category of the start.
        category_weights: for each categorical gene, numbers above 0 that the probability of each category as
            a new choice is proportional to; None for equal ones.
    """

    sigma: float
    population: int | None = None
    seed: int = 0
    diagonal: bool = False
    categories: tuple[int, ...] = ()
    keep_probability: float = 0.5
    category_weights: Sequence[Sequence[float]] | None = None


def default_population(genes: int) -> int:
    """The population of a generation where none is requested: 4 + floor(3 ln n), n at least 2.

    Args:
        genes: n, the length of a genome.

    Returns:
        The number of candidates.

    References:
        Hansen 2016, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, table 1.
    """
    return 4 + int(3 * math.log(max(2, genes)))


def is_diagonal(requested: bool | None, evaluations: int, genes: int) -> bool:
    """Whether CMA-ES is to learn a diagonal covariance matrix instead of a full one.

    Args:
        requested: the user's choice; None leaves it to the budget.
        evaluations: the budget of the search.
        genes: n, the length of a genome.

    Returns:
        The user's choice, else whether the budget is below 20 evaluations for each gene.
    """
    if requested is not None:
        return requested
    return evaluations < _EVALUATIONS_PER_GENE * genes
