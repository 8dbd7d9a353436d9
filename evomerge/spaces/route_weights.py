"""Weights once more, on a route: a few numbers that move what each model has in groups of its layers. Knows nothing of optimizers.

The route stays as it is, its merged layers become other merges of the same models; a layer passed through becomes the sum
of task vectors that it is a corner of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from evomerge.methods import method
from evomerge.recipes import Filtered, Mix, ParamValue, Recipe, Setting, Source, params
from evomerge.spaces.base import Axis

WEIGHT = "weight"


@dataclass(frozen=True)
class RouteWeightSpace:
    """Weight search around a recipe: in each group of output layers, what is added to each model's weight.

    recipe: what is searched around; models: those whose weights move; groups: how many groups of output layers; reach: most
    that a weight moves. A genome of zeros is the recipe itself. A layer whose merge has no weight for each model stays as it is.
    """

    recipe: Recipe
    base: str
    models: tuple[str, ...]
    groups: int
    reach: float = 0.5
    axes: tuple[Axis, ...] = field(init=False)
    _mixes: tuple[Mix, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mixes", tuple(self._plain(mix) for mix in self.recipe.layers))
        axes = [
            Axis(f"hops {span.start}-{span.stop - 1}", None, WEIGHT, model, -self.reach, self.reach, 0.0)
            for span in self.spans()
            for model in self.models
        ]
        object.__setattr__(self, "axes", tuple(axes))

    @property
    def start(self) -> tuple[float, ...]:
        """Zeros."""
        return (0.0,) * len(self.axes)

    def spans(self) -> list[range]:
        """Output layers of each group."""
        depth, groups = len(self.recipe.layers), min(self.groups, len(self.recipe.layers))
        edges = [depth * k // groups for k in range(groups + 1)]
        return [range(a, b) for a, b in pairwise(edges)]

    def decode(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome [len(axes)]; raises ValueError for another length or a value that is not finite."""
        if len(genome) != len(self.axes) or not all(math.isfinite(g) for g in genome):
            raise ValueError(f"a genome has {len(self.axes)} finite numbers, got {len(genome)}")
        moved = [axis.value(g) for axis, g in zip(self.axes, genome, strict=True)]
        if not any(moved):
            return self.recipe
        layers: list[Mix] = []
        for number, span in enumerate(self.spans()):
            own = dict(zip(self.models, moved[number * len(self.models) :], strict=False))
            layers += [
                self._moved(self._mixes[i], own) if any(own.values()) else self.recipe.layers[i] for i in span
            ]
        return self._without_stages(layers)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """Zeros for the recipe itself, None for any other."""
        return self.start if recipe.id == self.recipe.id else None

    def _without_stages(self, layers: Sequence[Mix]) -> Recipe:
        """The recipe with other layers; what a stage gave is written out, so that no stage is needed."""
        stages = dict(self.recipe.stages)

        def resolved(mix: Mix, part: Callable[[Recipe, int | None], Mix]) -> Mix:
            name, layer = mix.sources[0]
            return part(stages[name], layer) if mix.method == "passthrough" and name in stages else mix

        first = next(iter(stages.values()), self.recipe)
        return replace(
            self.recipe,
            layers=tuple(resolved(mix, lambda stage, layer: stage.layers[layer or 0]) for mix in layers),
            embeddings=resolved(self.recipe.embeddings, lambda stage, _: stage.embeddings),
            head=resolved(self.recipe.head, lambda stage, _: stage.head),
            stages=(),
            seed=first.seed,
        )

    def _plain(self, mix: Mix) -> Mix:
        """A layer as a merge with a weight for each model."""
        stages = dict(self.recipe.stages)
        name, layer = mix.sources[0]
        if mix.method == "passthrough" and name in stages:
            assert layer is not None
            return self._plain(stages[name].layers[layer])
        if mix.method == "passthrough":
            sources: tuple[Source, ...] = tuple((m, layer) for m in self.models)
            corner = tuple(float(m == name) for m in self.models)
            return Mix(
                "task_arithmetic",
                sources,
                (self.base, layer),
                params({WEIGHT: corner, "lambda": 1.0, "normalize": 0.0}),
            )
        return mix

    def _moved(self, mix: Mix, by: dict[str, float]) -> Mix:
        """A merge with its models' weights moved; models that it lacks are left out."""
        rule = method(mix.method).param(WEIGHT)
        if rule is None or rule.per != "model":
            return mix
        given = dict(mix.params)
        values: ParamValue = given.get(WEIGHT, rule.default)
        each = values if isinstance(values, tuple) else (values,) * len(mix.sources)
        weights = tuple(
            _add(value, by.get(model, 0.0), rule.digits)
            for (model, _), value in zip(mix.sources, each, strict=True)
        )
        return replace(mix, params=params({**given, WEIGHT: weights}))


def _add(value: Setting, by: float, digits: int) -> Setting:
    if isinstance(value, Filtered):
        return Filtered(tuple((text, round(number + by, digits)) for text, number in value.cases))
    return round(value + by, digits)
