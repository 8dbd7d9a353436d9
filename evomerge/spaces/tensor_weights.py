"""One weight for each tensor and parent: the space of a stage that learns coefficients by their gradient.

A gene is the weight itself, so that a derivative by a coefficient of the merge is one by a gene. Values are
snapped to the decimal grid of the parameter; recipe, YAML and merge hold one number. A recipe names each
tensor by a filter, which mergekit's YAML has too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from evomerge.methods import Method
from evomerge.recipes import Filtered, Mix, ParamValue, PerRow, Recipe, Setting, params
from evomerge.spaces.base import finite_genes

WEIGHT = "weight"
"""Name of the parameter that is learned."""
MOST_WEIGHT = 10.0
"""A weight beyond it is taken to be the bound."""


@dataclass(frozen=True, slots=True)
class TensorWeight:
    """The weight of one parent in one tensor.

    Attributes:
        tensor: Name of the output tensor.
        text: What a filter calls it: a part of its name that no other tensor of its mix has.
        layer: Its layer; None outside the stack.
        is_head: Whether it comes after the stack.
        source: The parent.
    """

    tensor: str
    text: str
    layer: int | None
    is_head: bool
    source: str

    @property
    def name(self) -> str:
        """'weight of math in model.layers.0.mlp.up_proj.weight'."""
        return f"{WEIGHT} of {self.source} in {self.tensor}"


@dataclass(frozen=True)
class TensorWeightSpace:
    """Weights of a sum of task vectors, tensor by tensor.

    Attributes:
        method: What merges the models: a sum of task vectors with weights.
        base: Name of the base model.
        models: Names of the models that are merged, in the order of a merge's sources.
        depth: Layers of the stack.
        axes: One for each gene; (tensor, parent) pairs without one change nothing and keep the start.
        fixed: The other parameters of the method, as the stage begins.
        start_weight: The weight of every parent where nothing better is known.
        out_dtype: Type of the merged model's tensors.
        seed: Seed of randomized methods.
    """

    method: Method
    base: str
    models: tuple[str, ...]
    depth: int
    axes: tuple[TensorWeight, ...]
    fixed: tuple[tuple[str, float], ...] = ()
    start_weight: float = 1.0
    out_dtype: str = "bfloat16"
    seed: int = 0

    @property
    def start(self) -> tuple[float, ...]:
        """The start's weight for every gene."""
        return (self.start_weight,) * len(self.axes)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        genes = finite_genes(genome, len(self.axes))
        values = {
            (axis.tensor, axis.source): snapped_weight(self.method, gene)
            for axis, gene in zip(self.axes, genes, strict=True)
        }
        layers = tuple(self._mix(values, layer, is_head=False) for layer in range(self.depth))
        embeddings, head = (self._mix(values, None, is_head=is_head) for is_head in (False, True))
        seed = self.seed if self.method.randomized else 0
        return Recipe(self.base, layers, embeddings, head, out_dtype=self.out_dtype, seed=seed)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome of a recipe of the same method, models, depth and other parameters.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] weights; None for a recipe of another kind.
        """
        if len(recipe.layers) != self.depth or recipe.base != self.base or recipe.stages or recipe.scales:
            return None
        if recipe.row_numbers:
            return None
        if not all(self._fits(mix) for mix in recipe.mixes):
            return None
        return tuple(self._read(recipe, axis) for axis in self.axes)

    def pull(self, partials: Mapping[tuple[str, str, str], float]) -> tuple[float, ...]:
        """Turns derivatives by coefficients of the merge into those by genes, the transpose of `decode`.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.

        Returns:
            [len(axes)] derivatives.
        """
        return tuple(partials.get((axis.tensor, WEIGHT, axis.source), 0.0) for axis in self.axes)

    @cached_property
    def _by_mix(self) -> dict[tuple[int | None, bool], list[TensorWeight]]:
        """(layer, whether it is the head) -> its axes, longer texts first: the first that fits decides."""
        found: dict[tuple[int | None, bool], list[TensorWeight]] = {}
        for axis in sorted(self.axes, key=lambda axis: (-len(axis.text), axis.text)):
            found.setdefault((axis.layer, axis.is_head), []).append(axis)
        return found

    def _mix(self, values: Mapping[tuple[str, str], float], layer: int | None, *, is_head: bool) -> Mix:
        """A merge of the models' layers, or of what is before or after the stack."""
        axes = self._by_mix.get((layer, is_head), [])
        weights: list[Setting] = []
        for model in self.models:
            cases = [(axis.text, values[axis.tensor, model]) for axis in axes if axis.source == model]
            rest = snapped_weight(self.method, self.start_weight)
            weights.append(Filtered((*cases, ("*", rest))) if cases else rest)
        settings: dict[str, ParamValue] = {**dict(self.fixed), WEIGHT: tuple(weights)}
        base = (self.base, layer) if self.method.needs_base else None
        return Mix(self.method.name, tuple((model, layer) for model in self.models), base, params(settings))

    def _read(self, recipe: Recipe, axis: TensorWeight) -> float:
        """The weight of a tensor in a recipe that fits."""
        mix = recipe.layers[axis.layer] if axis.layer is not None else recipe.embeddings
        if axis.is_head:
            mix = recipe.head
        value = dict(mix.params)[WEIGHT]
        setting = value[self.models.index(axis.source)] if isinstance(value, tuple) else value
        if isinstance(setting, Filtered):
            number = setting.at(axis.tensor)
            return self.start_weight if number is None else number
        assert not isinstance(setting, PerRow)
        return setting

    def _fits(self, mix: Mix) -> bool:
        """Whether a merge has the space's method and models, and the values of its other parameters."""
        if mix.method != self.method.name or tuple(model for model, _ in mix.sources) != self.models:
            return False
        given, fixed = dict(mix.params), dict(self.fixed)
        if WEIGHT not in given:
            return False
        for param in self.method.params:
            value = given.get(param.name, param.default)
            values = value if isinstance(value, tuple) else (value,)
            if param.name != WEIGHT and any(v != fixed.get(param.name, param.default) for v in values):
                return False
        return True


def snapped_weight(rule: Method, gene: float) -> float:
    """The weight that a gene stands for.

    Args:
        rule: A method with weights.
        gene: Any finite number.

    Returns:
        The gene on the decimal grid of the method's weights, within their bounds and -10 to 10.
    """
    return snapped_weights(rule, (gene,))[0]


def snapped_weights(rule: Method, genes: Sequence[float]) -> list[float]:
    """The weights that genes stand for.

    Args:
        rule: A method with weights.
        genes: Finite numbers.

    Returns:
        Of each what `snapped_weight` gives.
    """
    param = rule.param(WEIGHT)
    assert param is not None
    low, high = max(-MOST_WEIGHT, param.hard_low), min(MOST_WEIGHT, param.hard_high)
    return [round(min(high, max(low, gene)), param.digits) + 0.0 for gene in genes]
