"""The layers that a route may take, the recipe that a route is, and the scales between its layers.

Knows nothing of how a genome is laid out: that is a space's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import ConfigError
from evomerge.recipes import Mix, Recipe
from evomerge.spaces.logistic_curve import LogisticCurve

LayerRef = tuple[str, int]
"""(model, layer): one layer of a route."""
Scales = Literal["none", "hop", "matrix"]
"""Which scales a genome has: none, one for each position, or one for each pair (layer before, layer)."""

SIGMA = 1.0
"""The optimizer's first standard deviation, which genes are in units of."""
LOG_SCALE_STEP = 0.05
"""Standard deviation of the logarithm of a scale in a first sample."""
MAX_MUTATED_SHARE = 0.4
"""Largest share of the positions that a first sample changes, however many were asked for."""
_DIGITS = 4
_MARGIN = (
    1e-6  # a scale on a bound is encoded this fraction of the range inside: near enough to be rounded back
)


@dataclass(frozen=True, slots=True)
class Gene:
    """One searched number of a route.

    Attributes:
        name: What it changes.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Route:
    """The layers of a route and their scales.

    Attributes:
        layers: In the order in which a forward passes them.
        scales: Of the hidden state that enters each layer; the first is 1.
    """

    layers: tuple[LayerRef, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerPool:
    """The models of a route search: which layers a route may take, and what a route is as a recipe.

    Example:
        pool = LayerPool((("math", 32), ("code", 32)), "math", bounds=(24, 48))
        recipe = pool.recipe([("math", 0), ("code", 1)], [1.0, 1.0])

    Attributes:
        models: (name, depth) pairs in order; a depth is at least 1.
        begin: The model that gives base, embeddings and head, and whose path of layers a search starts at.
        stage: (name, recipe) of a model among them that is an intermediate merge; None if all are parents.
        bounds: (least, most) layers of a route, at least 1.
        scale_range: Bounds of a scale, with 1 between them, at least 0.0001.
        out_dtype: Type of the merged model's tensors.
    """

    models: tuple[tuple[str, int], ...]
    begin: str
    stage: tuple[str, Recipe] | None = None
    bounds: tuple[int, int] = (1, 10**6)
    scale_range: tuple[float, float] = (0.4, 1.5)
    out_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        depths = dict(self.models)
        if len(depths) < len(self.models) or any(depth < 1 for depth in depths.values()):
            raise ConfigError(
                "a route's models have names of their own and at least one layer each, "
                f"got {list(self.models)}"
            )
        for name in [self.begin, *([self.stage[0]] if self.stage else [])]:
            if name not in depths:
                raise ConfigError(f"'{name}' is not among the models of the route: {', '.join(depths)}")
        if self.stage is not None:
            name, merged = self.stage
            if len(merged.layers) != depths[name]:
                raise ConfigError(f"'{name}' has {len(merged.layers)} layers, not {depths[name]}")
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
    def layers(self) -> tuple[LayerRef, ...]:
        """Every layer of every model, in order."""
        return tuple((name, layer) for name, depth in self.models for layer in range(depth))

    @property
    def depth(self) -> int:
        """Layers of the model that a search begins with."""
        return dict(self.models)[self.begin]

    def recipe(self, layers: Sequence[LayerRef], scales: Sequence[float], outer: str | None = None) -> Recipe:
        """The recipe of a route.

        Args:
            layers: Of the route, at least one.
            scales: Of the hidden state that enters each layer; that of the first is taken as 1.
            outer: The model that gives embeddings and head; `begin` by default.

        Returns:
            The recipe; it carries the intermediate merge if the route uses it.
        """
        outer = outer or self.begin
        used = {outer, *(model for model, _ in layers)}
        stages = (self.stage,) if self.stage is not None and self.stage[0] in used else ()
        base = self.stage[1].base if self.stage is not None and self.stage[0] == outer else outer
        ends = Mix("passthrough", ((outer, None),))
        return Recipe(
            base,
            tuple(Mix("passthrough", (layer,)) for layer in layers),
            ends,
            ends,
            out_dtype=self.out_dtype,
            stages=stages,
            scales=(1.0, *scales[1:]),
        )

    def route(self, recipe: Recipe, outer: str | None = None) -> Route | None:
        """The route of a recipe.

        A parent as a weight search writes it, with that search's base, is a route too.

        Args:
            recipe: Any recipe.
            outer: The model that gives embeddings and head; `begin` by default.

        Returns:
            The route; None for a recipe that is no route over these layers, or has more or fewer than the
            bounds allow.
        """
        pool = frozenset(self.layers)
        layers: list[LayerRef] = []
        for mix in recipe.layers:
            model, layer = mix.sources[0]
            if layer is None or (model, layer) not in pool:
                return None
            layers.append((model, layer))
        if not self.bounds[0] <= len(layers) <= self.bounds[1]:
            return None
        scales = recipe.scales or (1.0,) * len(layers)
        rebuilt = self.recipe(layers, scales, outer)
        plain = replace(
            recipe,
            base=rebuilt.base,
            seed=rebuilt.seed,
            layers=tuple(map(_without_unit_factors, recipe.layers)),
            embeddings=_without_unit_factors(recipe.embeddings),
            head=_without_unit_factors(recipe.head),
        )
        return Route(tuple(layers), scales) if plain == rebuilt else None

    def scale(self, gene: float) -> float:
        """The scale of a gene: a logistic curve in log s through s = 1 at 0, with the slope `LOG_SCALE_STEP`.

        Args:
            gene: Any finite number.

        Returns:
            A scale in `scale_range`, with four decimals.
        """
        return round(math.exp(self._log_scale_curve.value(gene)), _DIGITS)

    def scale_gene(self, scale: float) -> float | None:
        """The gene of a scale, the inverse of `scale`.

        Args:
            scale: Any number.

        Returns:
            A gene; None for a scale that no gene gives.
        """
        if not self.scale_range[0] <= scale <= self.scale_range[1]:
            return None
        gene = self._log_scale_curve.gene(math.log(scale), _MARGIN)
        return gene if self.scale(gene) == scale else None

    @property
    def _log_scale_curve(self) -> LogisticCurve:
        low, high = self.scale_range
        return LogisticCurve(math.log(low), math.log(high), 0.0, LOG_SCALE_STEP)


def mutation_probability(expected_mutations: float, positions: int) -> float:
    """The probability with which a first sample changes each position of a route.

    Args:
        expected_mutations: How many positions a first sample is to change on average, above 0.
        positions: How many there are.

    Returns:
        expected_mutations / positions, at most `MAX_MUTATED_SHARE`.

    Raises:
        ConfigError: expected_mutations is not above 0.
    """
    if not expected_mutations > 0:
        raise ConfigError(f"changes must be above 0, got {expected_mutations:g}")
    return min(expected_mutations / positions, MAX_MUTATED_SHARE)


def _without_unit_factors(mix: Mix) -> Mix:
    """A mix that passes through, without the factors of 1 that it may spell out."""
    return replace(mix, params=()) if mix.passed else mix
