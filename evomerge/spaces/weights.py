"""Weight search: a vector of numbers <-> a merge of whole models, by layer groups and components.

A genome is a point of R^n, all zeros at the start. An axis maps its gene through a logistic curve onto (low,
high), scaled so that at the start one unit of gene moves the value by the axis' whole range: smooth,
monotone, never on a bound, so what is optimized is what is merged. Values are snapped to a decimal grid (the
parameter's `digits`): recipe, YAML and merge hold one number. Knows nothing of optimizers or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from evomerge.errors import ConfigError
from evomerge.methods import Method, Param
from evomerge.recipes import Filtered, Mix, ParamValue, PerRow, Recipe, Setting, Source, params, setting
from evomerge.spaces.base import Axis, finite_genes

EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds and start of a parameter; with low = high = start its fixed value.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        start: Where the search begins.
    """

    low: float
    high: float
    start: float


class _Place(NamedTuple):
    """Where a value belongs. component: None outside the layers; source: None for the whole merge."""

    group: str
    component: str | None
    param: str
    source: str | None


@dataclass(frozen=True)
class WeightSpace:
    """Weight search: layer groups x components x parents x parameters of one method.

    Example:
        space = WeightSpace(
            method("ties"),
            "base",
            ("math", "code"),
            groups=(8, 8, 8),
            components=("attention", "mlp"),
            segments=((".self_attn.", "attention"), (".mlp.", "mlp")),
            ranges={"weight": Range(-0.5, 2.0, 0.5), "density": Range(0.5, 0.5, 0.5)},
        )
        recipe = space.decode(space.start)

    Attributes:
        method: What merges the models.
        base: Name of the base model.
        models: Names of the models that are merged, in the order of a merge's sources.
        groups: Sizes of the layer groups from the bottom, which may differ.
        components: Those with axes of their own; tensors of other components take the mean of the listed
            ones.
        segments: (text in a tensor's name, component) pairs that tell the tensors of a layer apart; what no
            text matches is 'other'.
        ranges: Parameter name -> its range; parameters without one have the method's default.
        embeddings: Whether the embeddings are searched; else they take each parameter's start.
        head: Whether the head is searched; else it takes each parameter's start.
        dead: (group, component, model) triples whose task vectors are zero, hence not searched.
        out_dtype: Type of the merged model's tensors.
        seed: Seed of randomized methods.
        searchable: False for a space that only writes `uniform` recipes.
    """

    method: Method
    base: str
    models: tuple[str, ...]
    groups: tuple[int, ...]
    components: tuple[str, ...]
    segments: tuple[tuple[str, str], ...]
    ranges: Mapping[str, Range]
    embeddings: bool = True
    head: bool = True
    dead: frozenset[tuple[str, str | None, str]] = frozenset()
    out_dtype: str = "bfloat16"
    seed: int = 0
    searchable: bool = True

    def __post_init__(self) -> None:
        if not self.components:
            raise ConfigError("a space needs at least one component: attention, mlp or other")
        if self.searchable and not self.axes:
            names = ", ".join(p.name for p in self.method.params if not p.flag) or "none"
            raise ConfigError(
                "nothing to search: every parameter is fixed or every model equals the base; give a range in "
                f"space.parameters, {self.method.name} has {names}, or take another method"
            )

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """One for each gene: by group and component, then by parameter, then by model."""
        axes: list[Axis] = []
        for group, component in self._cells():
            if (group == EMBEDDINGS and not self.embeddings) or (group == HEAD and not self.head):
                continue
            for param in self.method.params:
                axes += self._axes_of(group, component, param)
        return tuple(axes)

    @property
    def start(self) -> tuple[float, ...]:
        """The genome of the axes' starts: zeros."""
        return (0.0,) * len(self.axes)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        genes = finite_genes(genome, len(self.axes))
        return self.with_values([axis.value(gene) for axis, gene in zip(self.axes, genes, strict=True)])

    def with_values(self, values: Sequence[float]) -> Recipe:
        """The recipe that has a value on each axis.

        Args:
            values: [len(axes)] numbers, on the axes' decimal grids.

        Returns:
            The recipe.
        """
        placed = {
            _Place(axis.group, axis.component, axis.param, axis.source): value
            for axis, value in zip(self.axes, values, strict=True)
        }
        return self._recipe(placed)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome nearest to a recipe of the same method, models, depth and fixed parameters.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes; None for a recipe of another kind.
        """
        values = self.values(recipe)
        if values is None:
            return None
        return tuple(axis.gene(value) for axis, value in zip(self.axes, values, strict=True))

    def values(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The value of each axis in a recipe of the same method, models, depth and fixed parameters.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] values, of a group those of its first layer; None for a recipe of another kind.
        """
        if not all(self._fits(mix) for mix in recipe.mixes) or len(recipe.layers) != sum(self.groups):
            return None
        if recipe.row_numbers:
            return None
        return tuple(self._read(recipe, axis) for axis in self.axes)

    def uniform(self, values: Mapping[str, float | Mapping[str, float]]) -> Recipe:
        """The recipe that uses the same numbers everywhere.

        Args:
            values: Parameter -> number, or -> model -> number. Parameters not named take their fixed value or
                start; switches take the method's default.

        Returns:
            The recipe.

        Raises:
            ConfigError: The method has no parameter of that name.
        """
        placed: dict[_Place, float] = {}
        for group, component in self._cells():
            for name, value in values.items():
                by_source: Mapping[str | None, float]
                if isinstance(value, Mapping):
                    by_source = dict(value.items())
                elif self._param(name).per == "merge":
                    by_source = {None: value}
                else:
                    by_source = dict.fromkeys(self.models, value)
                for source, number in by_source.items():
                    placed[_Place(group, component, name, source)] = setting(number, name)
        return self._recipe(placed)

    def spans(self) -> list[tuple[str, range]]:
        """(group name, layers) from the bottom."""
        spans: list[tuple[str, range]] = []
        first = 0
        for size in self.groups:
            name = f"layers {first}-{first + size - 1}" if size > 1 else f"layer {first}"
            spans.append((name, range(first, first + size)))
            first += size
        return spans

    def _cells(self) -> list[tuple[str, str | None]]:
        """(group, component) of everything that is merged, from the embeddings to the head."""
        cells: list[tuple[str, str | None]] = [(EMBEDDINGS, None)]
        cells += [(name, component) for name, _ in self.spans() for component in self.components]
        return [*cells, (HEAD, None)]

    def _axes_of(self, group: str, component: str | None, param: Param) -> list[Axis]:
        """The axes of a parameter in a cell; none for a switch or a fixed parameter."""
        bounds = self.ranges.get(param.name)
        if param.flag or bounds is None or bounds.low == bounds.high:
            return []
        sources: Sequence[str | None] = (None,)
        if param.per == "model":
            sources = [model for model in self.models if (group, component, model) not in self.dead]
        return [
            Axis(group, component, param.name, source, bounds.low, bounds.high, bounds.start, param.digits)
            for source in sources
        ]

    def _recipe(self, values: Mapping[_Place, float]) -> Recipe:
        """The recipe with these values, and fixed values or starts elsewhere."""
        layers: list[Mix] = []
        for name, span in self.spans():
            settings = self._settings(values, name)
            layers += [Mix(self.method.name, self._sources(i), self._base(i), settings) for i in span]
        embeddings, head = (
            Mix(self.method.name, self._sources(None), self._base(None), self._settings(values, group))
            for group in (EMBEDDINGS, HEAD)
        )
        seed = self.seed if self.method.randomized else 0
        return Recipe(self.base, tuple(layers), embeddings, head, out_dtype=self.out_dtype, seed=seed)

    def _settings(self, values: Mapping[_Place, float], group: str) -> tuple[tuple[str, ParamValue], ...]:
        """The parameters of a group's merges."""
        settings: dict[str, ParamValue] = {}
        for param in self.method.params:
            if param.per == "merge":
                settings[param.name] = self._setting(values, group, param, None)
            else:
                settings[param.name] = tuple(
                    self._setting(values, group, param, source) for source in self.models
                )
        return params(settings)

    def _setting(
        self, values: Mapping[_Place, float], group: str, param: Param, source: str | None
    ) -> Setting:
        """One parameter's number in a group, or one for each component."""
        default = self._default(param)
        if group in (EMBEDDINGS, HEAD):
            return values.get(_Place(group, None, param.name, source), default)
        by_component = {
            component: values.get(_Place(group, component, param.name, source), default)
            for component in self.components
        }
        return self._filtered(by_component, param.digits)

    def _filtered(self, values: Mapping[str, float], digits: int) -> Setting:
        """One value per component -> one setting; components without a value take the mean, snapped."""
        mean = round(math.fsum(values.values()) / len(values), digits) + 0.0
        cases = [(text, values.get(component, mean)) for text, component in self.segments]
        rest = values.get("other", mean)
        if all(value == rest for _, value in cases):
            return rest
        return Filtered((*cases, ("*", rest)))

    def _read(self, recipe: Recipe, axis: Axis) -> float:
        """The value of an axis in a recipe that fits the space; of a group that of its first layer."""
        if axis.group == EMBEDDINGS:
            mix = recipe.embeddings
        elif axis.group == HEAD:
            mix = recipe.head
        else:
            mix = recipe.layers[dict(self.spans())[axis.group].start]
        value = dict(mix.params).get(axis.param, self._param(axis.param).default)
        if isinstance(value, tuple):
            value = value[[model for model, _ in mix.sources].index(axis.source or "")]
        if isinstance(value, Filtered):
            text = next((t for t, component in self.segments if component == axis.component), "")
            number = value.at(text)
            return self._param(axis.param).default if number is None else number
        assert not isinstance(value, PerRow)
        return value

    def _fits(self, mix: Mix) -> bool:
        """Whether a merge has the space's method and models, and its value of each fixed parameter."""
        if mix.method != self.method.name or tuple(model for model, _ in mix.sources) != self.models:
            return False
        searched = {axis.param for axis in self.axes}
        given = dict(mix.params)
        for param in self.method.params:
            value = given.get(param.name, param.default)
            values = value if isinstance(value, tuple) else (value,)
            is_fixed = param.name not in searched
            if is_fixed and any(v != self._default(param) for v in values):
                return False
        return True

    def _param(self, name: str) -> Param:
        param = self.method.param(name)
        if param is None:
            names = ", ".join(p.name for p in self.method.params)
            raise ConfigError(f"{self.method.name} has no parameter '{name}'; it has {names}")
        return param

    def _default(self, param: Param) -> float:
        bounds = self.ranges.get(param.name)
        return setting(bounds.start, param.name) if bounds else param.default

    def _sources(self, layer: int | None) -> tuple[Source, ...]:
        return tuple((model, layer) for model in self.models)

    def _base(self, layer: int | None) -> Source | None:
        return (self.base, layer) if self.method.needs_base else None
