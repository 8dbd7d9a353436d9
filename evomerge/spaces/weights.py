"""Genome <-> recipe: the only place where a vector becomes a recipe. Knows nothing of optimizers or files.

A genome is a point of R^n, all zeros at the start. An axis maps its gene through a sigmoid onto (low, high), scaled
so that at the start one unit of gene moves the value by the axis' whole range: smooth, monotone, never on a bound,
so what is optimized is what is merged. Values are snapped to a decimal grid (the
parameter's `digits`): recipe, YAML and merge hold one number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.errors import ConfigError
from evomerge.methods import Method, Param
from evomerge.recipes import Filtered, Mix, ParamValue, Recipe, Setting, Source, params, setting
from evomerge.spaces.base import Axis

EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds and start of a parameter, or (low = high = start) its fixed value."""

    low: float
    high: float
    start: float


@dataclass(frozen=True)
class WeightSpace:
    """Weight search: layer groups x components x parents x parameters of one method.

    groups: sizes of the layer groups from the bottom, ragged allowed. segments: (text in a tensor's name, component)
    pairs that tell the tensors of a layer apart; what no text matches is 'other'. components: those with axes of
    their own; tensors of the rest take the mean of the listed ones. ranges: parameter name -> Range.
    dead: (group, component, model) triples whose task vectors are zero, hence not searched. searchable: False for a
    space that only writes `uniform` recipes.
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
    axes: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.components:
            raise ConfigError("a space needs at least one component: attention, mlp or other")
        object.__setattr__(self, "axes", tuple(self._axes()))
        if self.searchable and not self.axes:
            raise ConfigError("nothing to search: every parameter is fixed or every model equals the base")

    @property
    def start(self) -> tuple[float, ...]:
        """The genome of the axes' starts: zeros."""
        return (0.0,) * len(self.axes)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome [len(axes)]; raises ValueError for another length or a value that is not finite."""
        if len(genome) != len(self.axes) or not all(math.isfinite(g) for g in genome):
            raise ValueError(f"a genome has {len(self.axes)} finite numbers, got {len(genome)}")
        found = {
            (a.group, a.component, a.param, a.source): a.value(g)
            for a, g in zip(self.axes, genome, strict=True)
        }
        return self._recipe(found)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome nearest to a recipe of the same method, models, depth and fixed parameters; None for any other."""
        if not all(self._fits(mix) for mix in recipe.mixes) or len(recipe.layers) != sum(self.groups):
            return None
        return tuple(axis.gene(self._read(recipe, axis)) for axis in self.axes)

    def uniform(self, values: Mapping[str, float | Mapping[str, float]]) -> Recipe:
        """The recipe that uses the same numbers everywhere: parameter -> number, or -> {model: number}.

        Parameters not named take their fixed value or start; switches take the method's default.
        """
        found: dict[tuple[str, str | None, str, str | None], float] = {}
        for group, component in self._cells():
            for name, value in values.items():
                for source, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
                    targets = [source] if source or self._param(name).per == "merge" else list(self.models)
                    found.update({(group, component, name, t): setting(number, name) for t in targets})
        return self._recipe(found)

    def spans(self) -> list[tuple[str, range]]:
        """(group name, layers) from the bottom."""
        out, first = [], 0
        for size in self.groups:
            out.append(
                (
                    f"layers {first}-{first + size - 1}" if size > 1 else f"layer {first}",
                    range(first, first + size),
                )
            )
            first += size
        return out

    def _cells(self) -> list[tuple[str, str | None]]:
        cells: list[tuple[str, str | None]] = [(EMBEDDINGS, None)]
        cells += [(name, component) for name, _ in self.spans() for component in self.components]
        return [*cells, (HEAD, None)]

    def _axes(self) -> list[Axis]:
        axes = []
        for group, component in self._cells():
            if (group == EMBEDDINGS and not self.embeddings) or (group == HEAD and not self.head):
                continue
            for param in self.method.params:
                bounds = self.ranges.get(param.name)
                if param.flag or bounds is None or bounds.low == bounds.high:
                    continue
                for source in self.models if param.per == "model" else (None,):
                    alive = source is None or (group, component, source) not in self.dead
                    if alive:
                        axes.append(
                            Axis(
                                group,
                                component,
                                param.name,
                                source,
                                bounds.low,
                                bounds.high,
                                bounds.start,
                                param.digits,
                            )
                        )
        return axes

    def _recipe(self, found: Mapping[tuple[str, str | None, str, str | None], float]) -> Recipe:
        layers = []
        for name, span in self.spans():
            values = self._values(found, name)
            layers += [Mix(self.method.name, self._sources(i), self._base(i), values) for i in span]
        outer = {
            g: Mix(self.method.name, self._sources(None), self._base(None), self._values(found, g))
            for g in (EMBEDDINGS, HEAD)
        }
        return Recipe(
            self.base,
            tuple(layers),
            outer[EMBEDDINGS],
            outer[HEAD],
            out_dtype=self.out_dtype,
            seed=self._seed(),
        )

    def _values(
        self, found: Mapping[tuple[str, str | None, str, str | None], float], group: str
    ) -> tuple[tuple[str, ParamValue], ...]:
        inside = group not in (EMBEDDINGS, HEAD)
        out: dict[str, ParamValue] = {}
        for param in self.method.params:

            def one(source: str | None, param: Param = param) -> Setting:
                default = self._default(param)
                if not inside:
                    return found.get((group, None, param.name, source), default)
                return self._filtered(
                    {c: found.get((group, c, param.name, source), default) for c in self.components},
                    param.digits,
                )

            out[param.name] = one(None) if param.per == "merge" else tuple(one(s) for s in self.models)
        return params(out)

    def _filtered(self, values: Mapping[str, float], digits: int) -> Setting:
        """One value per component -> one setting; components without a value take the mean, snapped like the others."""
        mean = round(math.fsum(values.values()) / len(values), digits) + 0.0
        cases = [(text, values.get(component, mean)) for text, component in self.segments]
        rest = values.get("other", mean)
        if all(value == rest for _, value in cases):
            return rest
        return Filtered((*cases, ("*", rest)))

    def _read(self, recipe: Recipe, axis: Axis) -> float:
        if axis.group == EMBEDDINGS:
            mix = recipe.embeddings
        elif axis.group == HEAD:
            mix = recipe.head
        else:
            mix = recipe.layers[dict(self.spans())[axis.group].start]
        value = dict(mix.params).get(axis.param, self._param(axis.param).default)
        if isinstance(value, tuple):
            value = value[[m for m, _ in mix.sources].index(axis.source or "")]
        if isinstance(value, Filtered):
            text = next((t for t, component in self.segments if component == axis.component), "")
            found = value.at(text)
            return self._param(axis.param).default if found is None else found
        return value

    def _fits(self, mix: Mix) -> bool:
        if mix.method != self.method.name or tuple(m for m, _ in mix.sources) != self.models:
            return False
        searched, given = {axis.param for axis in self.axes}, dict(mix.params)
        for param in self.method.params:
            value = given.get(param.name, param.default)
            if param.name not in searched and any(
                v != self._default(param) for v in (value if isinstance(value, tuple) else (value,))
            ):
                return False
        return True

    def _param(self, name: str) -> Param:
        param = self.method.param(name)
        if param is None:
            raise ConfigError(
                f"{self.method.name} has no parameter '{name}'; it has {', '.join(p.name for p in self.method.params)}"
            )
        return param

    def _default(self, param: Param) -> float:
        bounds = self.ranges.get(param.name)
        return setting(bounds.start, param.name) if bounds else param.default

    def _sources(self, layer: int | None) -> tuple[Source, ...]:
        return tuple((m, layer) for m in self.models)

    def _base(self, layer: int | None) -> Source | None:
        return (self.base, layer) if self.method.needs_base else None

    def _seed(self) -> int:
        return self.seed if self.method.randomized else 0
