"""What every search space offers: axes with names, a start, decode and encode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.logistic_curve import LogisticCurve

DIGITS = 4  # decimals of a snapped value
_MARGIN = 1e-4  # encode keeps this fraction of the range away from the bounds


class NamedAxis(Protocol):
    """A dimension of a genome."""

    @property
    def name(self) -> str:
        """What it changes, unique within its space."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One searched number of a merge.

    At the start one unit of gene moves the value by the axis' whole range.

    Attributes:
        group: 'layers a-b', 'layer a', 'embeddings' or 'head'.
        component: 'attention', 'mlp' or 'other'; None outside the layers.
        param: Name of the method's parameter.
        source: The model; None for a parameter of the merge.
        low: Lower bound of a value.
        high: Upper bound of a value.
        start: Value of gene 0, between the bounds.
        digits: Decimals of a value.
        method: The methods that take it, where others take the parameter in another range; '' for all.
    """

    group: str
    component: str | None
    param: str
    source: str | None
    low: float
    high: float
    start: float
    digits: int = DIGITS
    method: str = ""

    def __post_init__(self) -> None:
        if not self.low < self.start < self.high:
            raise ConfigError(
                f"{self.name}: start {self.start:g} must lie inside ({self.low:g}, {self.high:g})"
            )

    @property
    def name(self) -> str:
        """'weight of math in layers 0-1, attention'."""
        model = f" of {self.source}" if self.source else ""
        component = f", {self.component}" if self.component else ""
        method = f", by {self.method}" if self.method else ""
        return f"{self.param}{model} in {self.group}{component}{method}"

    def value(self, gene: float) -> float:
        """The value of a gene, on the axis' decimal grid.

        Args:
            gene: Any finite number.

        Returns:
            A value in [low, high].
        """
        return round(self._curve.value(gene), self.digits) + 0.0

    def gene(self, value: float) -> float:
        """The gene of a value, the inverse of `value`.

        Args:
            value: Any number; one outside the bounds is moved just inside.

        Returns:
            The gene.
        """
        return self._curve.gene(value, _MARGIN)

    @property
    def _curve(self) -> LogisticCurve:
        return LogisticCurve(self.low, self.high, self.start)


class SearchSpace(Protocol):
    """What a stage searches: genome <-> recipe."""

    @property
    def axes(self) -> Sequence[NamedAxis]:
        """One for each gene."""

    @property
    def start(self) -> tuple[float, ...]:
        """The genome that a search starts at where nothing better is known."""

    def decode(self, genome: Sequence[float], /) -> Recipe:
        """The recipe of a genome; equal genomes give equal recipes.

        Args:
            genome: [len(axes)] finite numbers.

        Returns:
            The recipe.

        Raises:
            ValueError: Another length, or a value that is not finite.
        """

    def encode(self, recipe: Recipe, /) -> tuple[float, ...] | None:
        """The genome of a recipe, or of the nearest one that the space holds.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes; None for a recipe that the space cannot hold.
        """


def finite_genes(genome: Sequence[float], length: int) -> tuple[float, ...]:
    """Checks a genome.

    Args:
        genome: Given by a caller.
        length: How many genes it should have.

    Returns:
        The genes as floats.

    Raises:
        ValueError: Another length, or a value that is not finite.
    """
    if len(genome) != length or not all(math.isfinite(gene) for gene in genome):
        raise ValueError(f"a genome has {length} finite numbers, got {len(genome)}")
    return tuple(float(gene) for gene in genome)
