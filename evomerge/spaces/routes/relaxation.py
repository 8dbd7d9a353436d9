"""A relaxed route: shares of the models at each depth in place of a choice, so that a loss has a gradient.

At each depth the models' layers are averaged as weights, with the shares of a softmax; embeddings and head
are one more place. As the temperature falls the shares go to 0 and 1, and the largest of each place is a
route. It says which model fills a depth and nothing else: order, repeats and skips are another space's.

Embeddings and head are settled first, with equal shares of all layers, then the layers with embeddings and
head of one model: on the demo's models layers that are chosen beside averaged embeddings are wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from evomerge.recipes import Mix, Recipe, params
from evomerge.spaces.base import DIGITS, finite_genes
from evomerge.spaces.routes.layer_pool import Gene, LayerRef

Moving = Literal["all", "outer", "layers"]
"""Which places change: all, embeddings and head alone, or layers alone, with the largest share of the
others."""
_WEIGHT = "weight"
_UNITS = 10**DIGITS  # shares are whole multiples of one unit
_PART_OF_OUTER = 4  # the first in so many of the steps is for embeddings and head
_COLD = 0.2  # last temperature
_LEAST = 1e-9  # a share of 0 is encoded as this one


@dataclass(frozen=True)
class RelaxedRouteSpace:
    """Shares of whole models at each place: embeddings and head together, then each layer.

    Genes: for each place one for each model; the shares of a place are the softmax of its genes divided by
    the temperature, rounded to four decimals that add up to 1. A recipe is an average (`linear`) in the
    base's shape.

    Example:
        space = RelaxedRouteSpace("base", ("base", "math"), places={"model.norm.weight": None, ...}, depth=6)
        recipe = space.at_step(3, 24, genome).decode(genome)

    Attributes:
        base: Model whose shape all models have.
        models: Those that may fill a place.
        depth: Layers of each.
        places: Tensor -> its layer; None for a tensor outside the stack.
        outer: The model of embeddings and head; None where they are a place of their own.
        temperature: Divides the genes, above 0.
        point: Genome at which `pull` takes derivatives; None for the start.
        moving: Which places have derivatives; while layers move, embeddings and head are of one model.
        stage: (name, recipe) of a model among them that is an intermediate merge.
        out_dtype: Type of the merged model's tensors.
    """

    base: str
    models: tuple[str, ...]
    depth: int
    places: Mapping[str, int | None]
    outer: str | None = None
    temperature: float = 1.0
    point: tuple[float, ...] | None = None
    moving: Moving = "all"
    stage: tuple[str, Recipe] | None = None
    out_dtype: str = "bfloat16"

    @cached_property
    def axes(self) -> tuple[Gene, ...]:
        """One for each place and model."""
        names = [] if self.outer else ["embeddings and head"]
        names += [f"layer {layer}" for layer in range(self.depth)]
        return tuple(Gene(f"share of {model} at {name}") for name in names for model in self.models)

    @property
    def start(self) -> tuple[float, ...]:
        """Equal shares everywhere."""
        return (0.0,) * len(self.axes)

    def at_step(self, step: int, steps: int, point: Sequence[float]) -> RelaxedRouteSpace:
        """The space of a step: a quarter of the steps for embeddings and head, if they are a choice.

        In both parts the temperature falls from 1 to .2, by the same factor at each step.

        Args:
            step: From 0.
            steps: Of the descent.
            point: [len(axes)] genes at which `pull` takes derivatives.

        Returns:
            The space.
        """
        before = 0 if self.outer else steps // _PART_OF_OUTER
        moving: Moving = "outer" if step < before else "layers"
        done, last = (step, before - 1) if step < before else (step - before, steps - before - 1)
        temperature = _COLD ** (done / max(1, last))
        return replace(self, temperature=temperature, point=tuple(point), moving=moving)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        places = [_rounded(_softmax(logits, self.temperature)) for logits in self._logits(genome)]
        ends = Mix("linear", ((self.outer or self.base, None),), None, params({_WEIGHT: (1.0,)}))
        if self.outer is None:
            ends = self._mix(None, places.pop(0))
            if self.moving == "layers":
                shares = [float(model == self.route(genome)[0]) for model in self.models]
                ends = self._mix(None, shares)
        layers = tuple(self._mix(layer, shares) for layer, shares in enumerate(places))
        stages = () if self.stage is None else (self.stage,)
        return Recipe(self.base, layers, ends, ends, out_dtype=self.out_dtype, stages=stages)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """See `SearchSpace.encode`.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes, at the space's temperature; None for another kind of recipe.
        """
        if len(recipe.layers) != self.depth:
            return None
        mixes = [] if self.outer else [recipe.embeddings]
        genes: list[float] = []
        for mix in (*mixes, *recipe.layers):
            shares = dict(mix.params).get(_WEIGHT)
            if mix.method != "linear" or not isinstance(shares, tuple) or len(shares) != len(self.models):
                return None
            for share in shares:
                if not isinstance(share, float):
                    return None
                genes.append(self.temperature * math.log(max(share, _LEAST)))
        return tuple(genes) if self.decode(genes) == recipe else None

    def pull(self, partials: Mapping[tuple[str, str, str], float]) -> tuple[float, ...]:
        """Turns derivatives by the weights of the averages into those by genes, at `point`.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.

        Returns:
            [len(axes)] derivatives.
        """
        models = {model: number for number, model in enumerate(self.models)}
        by_share = [[0.0] * len(models) for _ in range(self.depth + (self.outer is None))]
        for (tensor, param, model), slope in partials.items():
            place = self._place(tensor)
            if param == _WEIGHT and place is not None:
                by_share[place][models[model]] += slope
        pulled: list[float] = []
        point = self._logits(self.point or self.start)
        for place, (logits, slopes) in enumerate(zip(point, by_share, strict=True)):
            is_outer = self.outer is None and place == 0
            if self.moving == ("layers" if is_outer else "outer"):
                pulled += [0.0] * len(models)
                continue
            shares = _softmax(logits, self.temperature)
            mean = math.fsum(p * slope for p, slope in zip(shares, slopes, strict=True))
            pulled += [p * (slope - mean) / self.temperature for p, slope in zip(shares, slopes, strict=True)]
        return tuple(pulled)

    def route(self, genome: Sequence[float]) -> tuple[str, tuple[LayerRef, ...]]:
        """The route of the largest share at each place; of equal ones that of the first model.

        Args:
            genome: [len(axes)] genes.

        Returns:
            (model of embeddings and head, layers).
        """
        largest = [self.models[logits.index(max(logits))] for logits in self._logits(genome)]
        outer = self.outer or largest.pop(0)
        return outer, tuple((model, layer) for layer, model in enumerate(largest))

    def _logits(self, genome: Sequence[float]) -> list[tuple[float, ...]]:
        """The genes of each place."""
        genes, count = finite_genes(genome, len(self.axes)), len(self.models)
        return [genes[first : first + count] for first in range(0, len(genes), count)]

    def _place(self, tensor: str) -> int | None:
        """The place that a tensor belongs to; None for one whose shares are fixed."""
        if tensor not in self.places:
            return None
        layer = self.places[tensor]
        if layer is None:
            return None if self.outer else 0
        return layer + (self.outer is None)

    def _mix(self, layer: int | None, shares: Sequence[float]) -> Mix:
        sources = tuple((model, layer) for model in self.models)
        return Mix("linear", sources, None, params({_WEIGHT: tuple(shares)}))


def _softmax(logits: Sequence[float], temperature: float) -> list[float]:
    largest = max(logits)
    powers = [math.exp((logit - largest) / temperature) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _rounded(shares: Sequence[float]) -> list[float]:
    """Shares as multiples of one unit that add up to 1: those that lose most by rounding down are raised."""
    exact = [share * _UNITS for share in shares]
    units = [math.floor(value) for value in exact]
    by_loss = sorted(range(len(shares)), key=lambda i: (units[i] - exact[i], i))
    for i in by_loss[: _UNITS - sum(units)]:
        units[i] += 1
    return [count / _UNITS for count in units]
