"""What every search space offers: axes with names, a start, decode and encode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe

DIGITS = 4  # decimals of a snapped value
_EDGE = 1e-4  # encode keeps this fraction of the range away from the bounds


@dataclass(frozen=True, slots=True)
class Axis:
    """One searched number. group: 'layers a-b', 'embeddings' or 'head'; component: None outside the layers;
    source: the model, None for a parameter of the merge; low < start < high; digits: decimals of a value."""

    group: str
    component: str | None
    param: str
    source: str | None
    low: float
    high: float
    start: float
    digits: int = DIGITS

    def __post_init__(self) -> None:
        if not self.low < self.start < self.high:
            raise ConfigError(
                f"{self.name}: start {self.start:g} must lie inside ({self.low:g}, {self.high:g})"
            )

    @property
    def name(self) -> str:
        """'weight of math in layers 0-1, attention'."""
        of = f" of {self.source}" if self.source else ""
        return f"{self.param}{of} in {self.group}" + (f", {self.component}" if self.component else "")

    def value(self, gene: float) -> float:
        """Gene in R -> value in [low, high], snapped."""
        f0 = (self.start - self.low) / (self.high - self.low)
        z = _logit(f0) + gene / (f0 * (1 - f0))
        return (
            round(
                self.low + (self.high - self.low) / (1 + math.exp(-max(-700.0, min(700.0, z)))), self.digits
            )
            + 0.0
        )

    def gene(self, value: float) -> float:
        """Inverse of `value`; values outside the bounds are moved just inside."""
        f0 = (self.start - self.low) / (self.high - self.low)
        f = min(1 - _EDGE, max(_EDGE, (value - self.low) / (self.high - self.low)))
        return (_logit(f) - _logit(f0)) * f0 * (1 - f0)


def _logit(f: float) -> float:
    return math.log(f / (1 - f))


class SearchSpace(Protocol):
    """What a stage searches: genome <-> recipe."""

    @property
    def axes(self) -> Sequence[Any]:
        """One a gene, each with a `name`."""

    @property
    def start(self) -> tuple[float, ...]:
        """The genome that a search starts at where nothing better is known."""

    def decode(self, genome: Sequence[float], /) -> Recipe:
        """The recipe of a genome."""

    def encode(self, recipe: Recipe, /) -> tuple[float, ...] | None:
        """The genome of a recipe, or the nearest; None for a recipe the space cannot hold."""
