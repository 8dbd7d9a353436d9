"""The layers that a route may take, the recipe that a route is, and the scales of its hops. Knows nothing of genomes' layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import ConfigError
from evomerge.recipes import Mix, Recipe

Hop = tuple[str, int]
"""(model, layer): one layer on a route's way."""
Scales = Literal["none", "hop", "matrix"]

SIGMA = 1.0
"""The optimizer's first standard deviation that genes are in units of."""
STEP = 0.05
"""Standard deviation of the logarithm of a scale in a first sample."""
MOST = 0.4
"""Largest share of the positions that a first sample changes, whatever was asked."""
_DIGITS = 4
_EDGE = (
    1e-6  # a scale on a bound is encoded this fraction of the range inside, near enough to be rounded back
)


@dataclass(frozen=True, slots=True)
class Gene:
    """One searched number."""

    name: str


@dataclass(frozen=True, slots=True)
class LayerPool:
    """models: (name, depth) in order; begin: the model that gives base, embeddings and head and whose path a search starts at;
    stage: (name, recipe) of a model among them that is a merge itself; bounds: [least, most] layers of a route;
    scale_range: bounds of a scale, 1 between them. Raises ConfigError.
    """

    models: tuple[tuple[str, int], ...]
    begin: str
    stage: tuple[str, Recipe] | None = None
    bounds: tuple[int, int] = (1, 10**6)
    scale_range: tuple[float, float] = (0.4, 1.5)
    out_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if len(set(names)) < len(names) or any(depth < 1 for _, depth in self.models):
            raise ConfigError(
                f"a route's models have names of their own and at least one layer each, got {list(self.models)}"
            )
        for name in [self.begin] + ([self.stage[0]] if self.stage else []):
            if name not in names:
                raise ConfigError(f"'{name}' is not among the models of the route: {', '.join(names)}")
        if self.stage is not None and len(self.stage[1].layers) != dict(self.models)[self.stage[0]]:
            raise ConfigError(
                f"'{self.stage[0]}' has {len(self.stage[1].layers)} layers, not {dict(self.models)[self.stage[0]]}"
            )
        if not 1 <= self.bounds[0] <= self.bounds[1]:
            raise ConfigError(
                f"the layers of a route are [least, most], both at least 1, got {list(self.bounds)}"
            )
        low, high = self.scale_range
        if not 10.0**-_DIGITS <= low < 1 < high < math.inf:
            raise ConfigError(
                f"scale_range must hold 1 and begin at 0.0001 or above, got {list(self.scale_range)}"
            )

    @property
    def layers(self) -> tuple[Hop, ...]:
        """Every layer of every model, in order."""
        return tuple((name, layer) for name, depth in self.models for layer in range(depth))

    @property
    def depth(self) -> int:
        """Layers of the model that a search begins with."""
        return dict(self.models)[self.begin]

    def recipe(self, hops: Sequence[Hop], scales: Sequence[float], outer: str | None = None) -> Recipe:
        """The recipe of a route. scales: of the hidden state that enters each hop; that of the first is taken as 1. outer: the
        model that gives embeddings and head, `begin` unless named."""
        outer = outer or self.begin
        stages = (
            (self.stage,) if self.stage and self.stage[0] in (outer, *(model for model, _ in hops)) else ()
        )
        base = self.stage[1].base if self.stage and self.stage[0] == outer else outer
        own = Mix("passthrough", ((outer, None),))
        layers = tuple(Mix("passthrough", (hop,)) for hop in hops)
        return Recipe(
            base, layers, own, own, out_dtype=self.out_dtype, stages=stages, scales=(1.0, *scales[1:])
        )

    def route(
        self, recipe: Recipe, outer: str | None = None
    ) -> tuple[tuple[Hop, ...], tuple[float, ...]] | None:
        """(hops, a scale for each) of a recipe that is a route over these layers within the bounds; None for any other.

        outer: as for `recipe`. A parent as a weight search writes it, with that search's base, is a route too.
        """
        known, hops = frozenset(self.layers), []
        for mix in recipe.layers:
            model, layer = mix.sources[0]
            if layer is None or (model, layer) not in known:
                return None
            hops.append((model, layer))
        scales = recipe.scales or (1.0,) * len(hops)
        if not self.bounds[0] <= len(hops) <= self.bounds[1]:
            return None
        made = self.recipe(hops, scales, outer)
        plain = replace(recipe, base=made.base, seed=made.seed, layers=tuple(map(_bare, recipe.layers)))
        plain = replace(plain, embeddings=_bare(recipe.embeddings), head=_bare(recipe.head))
        return (tuple(hops), scales) if plain == made else None

    def scale(self, gene: float) -> float:
        """Gene in R -> scale in `scale_range`, snapped to four decimals: a logistic curve in log s through s = 1 at 0, with the slope STEP."""
        low, width, middle = self._curve()
        z = _logit(middle) + gene * STEP / (width * middle * (1 - middle))
        return round(math.exp(low + width / (1 + math.exp(-max(-700.0, min(700.0, z))))), _DIGITS)

    def scale_gene(self, scale: float) -> float | None:
        """Inverse of `scale`; None for a scale that no gene gives."""
        if not self.scale_range[0] <= scale <= self.scale_range[1]:
            return None
        low, width, middle = self._curve()
        share = min(1 - _EDGE, max(_EDGE, (math.log(scale) - low) / width))
        gene = (_logit(share) - _logit(middle)) * width * middle * (1 - middle) / STEP + 0.0
        return gene if self.scale(gene) == scale else None

    def _curve(self) -> tuple[float, float, float]:
        """(low end, width, share of the width below s = 1), of log s."""
        low, high = (math.log(s) for s in self.scale_range)
        return low, high - low, -low / (high - low)


def finite(genome: Sequence[float], length: int) -> tuple[float, ...]:
    """The genes as floats; raises ValueError for another length or a value that is not finite."""
    if len(genome) != length or not all(math.isfinite(g) for g in genome):
        raise ValueError(f"a genome has {length} finite numbers, got {len(genome)}")
    return tuple(float(g) for g in genome)


def share(changes: float, positions: int) -> float:
    """The probability with which a first sample changes each of the positions, so that it changes about `changes` of them."""
    if not changes > 0:
        raise ConfigError(f"changes must be above 0, got {changes:g}")
    return min(changes / positions, MOST)


def _bare(mix: Mix) -> Mix:
    """A mix that passes through, without the factors of 1 that it may spell out."""
    return replace(mix, params=()) if mix.passed else mix


def _logit(f: float) -> float:
    return math.log(f / (1 - f))
