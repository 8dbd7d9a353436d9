"""Weight search that chooses the method of each layer group: a mixed genome <-> a merge by several methods.

The first genes are categories, the method of each group. The others are the numbers of the methods'
parameters, as in `weights`: methods share a gene where they take a parameter in the same range, and a number
that a group's method does not take changes nothing. Knows nothing of optimizers or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.base import Axis, finite_genes
from evomerge.spaces.weights import EMBEDDINGS, HEAD, WeightSpace


@dataclass(frozen=True, slots=True)
class MethodAxis:
    """The choice of a group's method.

    Attributes:
        group: 'layers a-b', 'layer a', 'embeddings' or 'head'.
        methods: Names of the methods, in the order of their categories.
    """

    group: str
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """'method of layers 0-1'."""
        return f"method of {self.group}"


@dataclass(frozen=True)
class MethodChoiceSpace:
    """Weight search over several methods, one of which merges each layer group, the embeddings and the head.

    A group in which every model equals the base has no choice, nor have embeddings or head that are not
    searched: they are merged by the first method.

    Example:
        space = MethodChoiceSpace((space_of("task_arithmetic"), space_of("ties")))
        recipe = space.decode(space.start)

    Attributes:
        alternatives: A space of weights for each method, at least two; they differ in what follows from the
            method alone.
    """

    alternatives: tuple[WeightSpace, ...]

    def __post_init__(self) -> None:
        if len(set(self.methods)) < max(2, len(self.alternatives)):
            listed = ", ".join(self.methods) or "none"
            raise ConfigError(f"a choice is between two or more different methods, got {listed}")
        if not self.choices:
            raise ConfigError(
                "nothing to choose: every model equals the base in all groups; give models that differ"
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order of their categories."""
        return tuple(space.method.name for space in self.alternatives)

    @property
    def dead(self) -> frozenset[tuple[str, str | None, str]]:
        """(group, component, model) triples whose task vectors are zero, see `WeightSpace.dead`."""
        return frozenset().union(*(space.dead for space in self.alternatives))

    @cached_property
    def choices(self) -> tuple[MethodAxis, ...]:
        """One for each categorical gene: embeddings, the layer groups from the bottom, head."""
        first = self.alternatives[0]
        groups = [
            *([EMBEDDINGS] if first.embeddings else []),
            *(name for name, _ in first.spans()),
            *([HEAD] if first.head else []),
        ]
        return tuple(MethodAxis(group, self.methods) for group in groups if not self._is_dead(group))

    @property
    def categories(self) -> tuple[int, ...]:
        """Number of methods that each categorical gene chooses from."""
        return (len(self.alternatives),) * len(self.choices)

    @property
    def keep_probability(self) -> float:
        """Probability that a first sample has the start's method in a group: all methods are as likely."""
        return 1 / len(self.alternatives)

    @cached_property
    def axes(self) -> tuple[MethodAxis | Axis, ...]:
        """One for each gene: the choices, then the numbers by group."""
        counts = Counter(axis.name for axis in self._numbers)
        named = [
            axis if counts[axis.name] == 1 else replace(axis, method=" and ".join(self._takers(axis)))
            for axis in self._numbers
        ]
        return (*self.choices, *named)

    @property
    def start(self) -> tuple[float, ...]:
        """The first method everywhere, at the starts of its numbers: zeros."""
        return (0.0,) * len(self.axes)

    def spans(self) -> list[tuple[str, range]]:
        """(group name, layers) from the bottom."""
        return self.alternatives[0].spans()

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`.

        Args:
            genome: [len(axes)] genes, the first whole numbers.

        Returns:
            The recipe.

        Raises:
            ValueError: Also for a method that does not exist.
        """
        genes = finite_genes(genome, len(self.axes))
        lead, count = len(self.choices), len(self.alternatives)
        for axis, gene in zip(self.choices, genes[:lead], strict=True):
            if gene not in range(count):
                raise ValueError(f"the {axis.name} is a whole number in [0, {count}), got {gene:g}")
        chosen = {axis.group: int(gene) for axis, gene in zip(self.choices, genes[:lead], strict=True)}
        numbers = dict(zip(self._numbers, genes[lead:], strict=True))
        recipes = [
            space.decode([numbers.get(axis, 0.0) for axis in space.axes]) for space in self.alternatives
        ]
        return self._assembled({group: recipes[chosen.get(group, 0)] for group in self._groups})

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome nearest to a recipe of the same methods, models, depth and fixed parameters.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes, of a group those of its first layer; None for a recipe of another kind.
        """
        chosen = self._chosen(recipe)
        if chosen is None or recipe.stages or recipe.scales:
            return None
        numbers = dict.fromkeys(self._numbers, 0.0)
        for number in sorted(set(chosen.values())):
            space = self.alternatives[number]
            start = space.decode(space.start)
            own = {group: recipe if chosen[group] == number else start for group in self._groups}
            values = space.values(self._assembled(own))
            if values is None:
                return None
            for axis, value in zip(space.axes, values, strict=True):
                if chosen[axis.group] == number and axis in numbers:
                    numbers[axis] = axis.gene(value)
        return (*(float(chosen[axis.group]) for axis in self.choices), *numbers.values())

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        """All groups in the order of the output."""
        return (EMBEDDINGS, *(name for name, _ in self.spans()), HEAD)

    @cached_property
    def _numbers(self) -> tuple[Axis, ...]:
        """The axes of the methods' parameters, without repeats, by group."""
        chosen = {axis.group for axis in self.choices}
        distinct = dict.fromkeys(
            axis
            for number, space in enumerate(self.alternatives)
            for axis in space.axes
            if axis.group in chosen or number == 0
        )
        return tuple(sorted(distinct, key=lambda axis: self._groups.index(axis.group)))

    def _takers(self, axis: Axis) -> list[str]:
        """The methods that take a number."""
        return [space.method.name for space in self.alternatives if axis in space.axes]

    def _is_dead(self, group: str) -> bool:
        """Whether every model equals the base in a group."""
        first = self.alternatives[0]
        components = (None,) if group in (EMBEDDINGS, HEAD) else first.components
        models = [model for model in first.models if model != first.base]
        return all((group, component, model) in self.dead for component in components for model in models)

    def _assembled(self, recipes: Mapping[str, Recipe]) -> Recipe:
        """A recipe whose groups are each taken from the recipe that they are given."""
        layers = [mix for name, span in self.spans() for mix in recipes[name].layers[span.start : span.stop]]
        return replace(
            recipes[EMBEDDINGS],
            layers=tuple(layers),
            embeddings=recipes[EMBEDDINGS].embeddings,
            head=recipes[HEAD].head,
            seed=max(recipe.seed for recipe in recipes.values()),  # 0 of methods that draw no masks
        )

    def _chosen(self, recipe: Recipe) -> dict[str, int] | None:
        """Group -> number of its method in a recipe; None where that is none of this space."""
        if len(recipe.layers) != sum(self.alternatives[0].groups):
            return None
        methods = {EMBEDDINGS: {recipe.embeddings.method}, HEAD: {recipe.head.method}}
        for name, span in self.spans():
            methods[name] = {recipe.layers[layer].method for layer in span}
        if any(len(names) > 1 or not names <= set(self.methods) for names in methods.values()):
            return None
        return {group: self.methods.index(names.pop()) for group, names in methods.items()}


MergeSpace = WeightSpace | MethodChoiceSpace
"""A space whose points are merges of whole models."""


def first_method(space: MergeSpace) -> WeightSpace:
    """The space of a search's only method, or of the first of those that it chooses from.

    Args:
        space: A space of merges.

    Returns:
        A space of weights of the same layers and models.
    """
    return space.alternatives[0] if isinstance(space, MethodChoiceSpace) else space
