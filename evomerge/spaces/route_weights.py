"""Weight search on a given route: numbers that move the weight of each model in groups of output layers.

The route stays as it is. Its merged layers become other merges of the same models; a layer passed through
becomes the sum of task vectors that equals it, with weight 1 for its own model and 0 for the others. Knows
nothing of optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from evomerge.methods import method
from evomerge.recipes import Filtered, Mix, ParamValue, PerRow, Recipe, Setting, Source, params
from evomerge.spaces.base import Axis, finite_genes

WEIGHT = "weight"
"""Name of the parameter that is searched."""


@dataclass(frozen=True)
class RouteWeightSpace:
    """Weight search around a recipe: in each group of output layers, what is added to each model's weight.

    A genome of zeros is the recipe itself. A layer whose merge has no weight for each model stays as it is.

    Example:
        space = RouteWeightSpace(route, "base", ("math", "code"), groups=4)

    Attributes:
        recipe: What is searched around.
        base: Name of the base model, of which task vectors are taken.
        models: Those whose weights move.
        groups: How many groups of consecutive output layers there are, at most as many as layers.
        reach: Most that a weight moves, above 0.
    """

    recipe: Recipe
    base: str
    models: tuple[str, ...]
    groups: int
    reach: float = 0.5

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """One for each gene: by group, then by model."""
        return tuple(
            Axis(f"hops {span.start}-{span.stop - 1}", None, WEIGHT, model, -self.reach, self.reach, 0.0)
            for span in self.spans()
            for model in self.models
        )

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
        """See `SearchSpace.decode`."""
        genes = finite_genes(genome, len(self.axes))
        changes = [axis.value(gene) for axis, gene in zip(self.axes, genes, strict=True)]
        if not any(changes):
            return self.recipe
        layers: list[Mix] = []
        for number, span in enumerate(self.spans()):
            first = number * len(self.models)
            by_model = dict(zip(self.models, changes[first : first + len(self.models)], strict=True))
            if any(by_model.values()):
                layers += [self._moved(self._weighted_layers[i], by_model) for i in span]
            else:
                layers += [self.recipe.layers[i] for i in span]
        return self._without_stages(layers)

    @cached_property
    def _weighted_layers(self) -> tuple[Mix, ...]:
        """The recipe's layers as merges with a weight for each model."""
        return tuple(self._weighted(mix) for mix in self.recipe.layers)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """Finds the genome of the recipe that is searched around.

        Args:
            recipe: Any recipe.

        Returns:
            Zeros for the recipe itself, None for any other.
        """
        return self.start if recipe.id == self.recipe.id else None

    def _without_stages(self, layers: Sequence[Mix]) -> Recipe:
        """The recipe with other layers; what intermediate merges gave is written out, so none is needed."""
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

    def _weighted(self, mix: Mix) -> Mix:
        """A layer as a merge with a weight for each model."""
        stages = dict(self.recipe.stages)
        name, layer = mix.sources[0]
        if mix.method == "passthrough" and name in stages:
            assert layer is not None
            return self._weighted(stages[name].layers[layer])
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

    def _moved(self, mix: Mix, by_model: dict[str, float]) -> Mix:
        """A merge with its models' weights moved; changes of models that it lacks have no effect."""
        rule = method(mix.method).param(WEIGHT)
        if rule is None or rule.per != "model":
            return mix
        given = dict(mix.params)
        values: ParamValue = given.get(WEIGHT, rule.default)
        each = values if isinstance(values, tuple) else (values,) * len(mix.sources)
        weights = tuple(
            _add(value, by_model.get(model, 0.0), rule.digits)
            for (model, _), value in zip(mix.sources, each, strict=True)
        )
        return replace(mix, params=params({**given, WEIGHT: weights}))


def _add(value: Setting, change: float, digits: int) -> Setting:
    """A setting with each of its numbers moved."""
    if isinstance(value, Filtered):
        return Filtered(tuple((text, round(number + change, digits)) for text, number in value.cases))
    if isinstance(value, PerRow):
        moved = ((text, tuple(round(number + change, digits) for number in row)) for text, row in value.cases)
        return PerRow(tuple(moved), round(value.rest + change, digits))
    return round(value + change, digits)
