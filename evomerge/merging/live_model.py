"""A recipe made live: the module that computes it, over models loaded once. Knows nothing of scoring.

A weight merge of the base's shape is written into the resident skeleton. Any other recipe is a route: layers of parents
stay where they are and are taken by reference, merged ones come from a skeleton.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints import Parent
from evomerge.errors import CandidateError
from evomerge.merging import merge, tensor_plan
from evomerge.merging.merged_config import layer_changes
from evomerge.merging.model_loading import load_parent
from evomerge.merging.routing import checks, decoder_layers, layer_config, plain_checkpoint, routed_model
from evomerge.merging.routing.routed_model import Hop, Routed
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import method
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Filtered, Mix, Recipe


@dataclass(frozen=True, slots=True)
class CandidateModel:
    """A candidate's module. routed: None for the skeleton itself; hops: its route; usual: a route of the same kinds of layers
    that is the same for every candidate, on which techniques are probed."""

    module: nn.Module
    routed: Routed | None = None
    hops: tuple[Hop, ...] = ()
    usual: tuple[Hop, ...] = ()

    def settle(self) -> None:
        """Makes the module the usual route."""
        if self.routed is not None:
            self.routed.install(self.usual)

    def install(self) -> None:
        """Makes the module the candidate."""
        if self.routed is not None:
            self.routed.install(self.hops)


@dataclass(slots=True)
class _Skeleton:
    """A model that merges are written into. holds: id of the recipe whose weights it has, if it is one recipe's."""

    model: nn.Module
    resident: WeightMap
    holds: str | None = None


class ModelBuilder:
    """The models of one worker: recipe -> module."""

    def __init__(
        self,
        files: Mapping[str, Parent],
        parents: Mapping[str, Parent],
        base: str,
        skeleton: nn.Module,
        dtype: str,
        device: str,
        known: MagnitudeTables,
    ) -> None:
        """files: the parents as they are on disk; parents: where merges read them, see `evomerge.merging.parent_placement`. skeleton: the
        base, loaded on the device; it is written to. dtype: of the tensors that are scored and shipped."""
        self._files, self._parents, self._base, self._dtype, self._device, self._known = (
            files,
            parents,
            base,
            dtype,
            device,
            known,
        )
        self._skeletons = [_Skeleton(skeleton, WeightMap(skeleton, parents[base].tensors))]
        self._models: dict[str, nn.Module] = {}
        self._shells: dict[tuple[int, frozenset[str]], Routed] = {}
        self._kinds: dict[tuple[int, int], str] = {}
        self._reasons: dict[tuple[int, tuple[str, ...]], tuple[str, ...]] = {}

    def view(self, recipe: Recipe) -> CandidateModel:
        """The module of a recipe, merged as far as it has to be; `install` makes it ready.

        Raises what a merge raises, RouteError for layers that do not fit together.
        """
        if self._is_skeleton(recipe):
            self._skeletons[
                0
            ].holds = None  # each candidate is merged anew, whatever the one before it left behind
            return CandidateModel(self._filled(0, recipe).model)
        stages = {
            name: self._filled(number, stage).model for number, (name, stage) in enumerate(recipe.stages)
        }
        hops, outer = self._hops(recipe, stages)
        gains = routed_model.gains(recipe.scales, len(hops))
        hops = [replace(hop, gain=gain) for hop, gain in zip(hops, gains, strict=True)]
        kinds = frozenset(self._kind(hop) for hop in hops)
        routed = self._shells.get((id(outer), kinds))
        if routed is None:
            routed = self._shells[id(outer), kinds] = Routed(
                outer, list(dict.fromkeys(h.model for h in hops))
            )
        return CandidateModel(routed.model, routed, tuple(hops), self._usual(outer, hops, kinds))

    def reasons(self, view: CandidateModel) -> tuple[str, ...]:
        """Why an installed route is not a plain checkpoint; none for one that is."""
        if view.routed is None:
            return ()
        key = (id(view.routed), tuple(self._kind(hop) for hop in view.hops))
        if key not in self._reasons:
            self._reasons[key] = plain_checkpoint.reasons(view.routed)
        return self._reasons[key]

    def costs(self, view: CandidateModel) -> dict[str, float]:
        """'layers' and 'parameters' of a candidate as it is shipped: a layer taken twice counts twice."""
        _, layers = decoder_layers.stack(view.module)
        return {
            "layers": float(len(layers)),
            "parameters": float(sum(p.numel() for p in view.module.parameters()) + _repeated(list(layers))),
        }

    def check_routable(self, names: Sequence[str], scaled: bool) -> None:
        """Raises RouteError or FoldError unless layers of these models can be routed, with scales if asked: by structure and by numbers."""
        models = {name: self.model(name) for name in names}
        checks.check_routable(models, names[0])
        for model in models.values():
            checks.routable_by_numbers(model)
        if scaled:
            for model in models.values():
                checks.check_scalable(model)

    def model(self, name: str) -> nn.Module:
        """A parent as it is, loaded at first use."""
        if name not in self._models:
            self._models[name] = load_parent(self._files[name], self._dtype).to(self._device)
        return self._models[name]

    # ---- a route's layers --------------------------------------------------------------------------------------------------

    def _hops(self, recipe: Recipe, stages: Mapping[str, nn.Module]) -> tuple[list[Hop], nn.Module]:
        """The route, and the model whose embeddings and head it has."""
        found: dict[int, Hop] = {}
        mixed: dict[int, Mix] = {}
        for position, mix in enumerate(recipe.layers):
            source = mix.passed
            if source is None:
                mixed[position] = mix
            else:
                model, layer = source
                found[position] = Hop(stages[model] if model in stages else self.model(model), _index(layer))
        outer = self._outer(recipe, stages)
        if mixed or outer is None:
            merged, number = self._merge(recipe, mixed, len(stages), outer is None)
            found |= merged
            outer = self._skeleton(number).model if outer is None else outer
        return [found[position] for position in range(len(recipe.layers))], outer

    def _outer(self, recipe: Recipe, stages: Mapping[str, nn.Module]) -> nn.Module | None:
        """The model whose tensors outside the stack a recipe takes over whole, None if it mixes them."""
        sources = [recipe.embeddings.passed, recipe.head.passed]
        if sources[0] is None or sources[1] is None or sources[0][0] != sources[1][0]:
            return None
        name = sources[0][0]
        if name in stages:
            return stages[name]
        return (
            self.model(name)
            if name == recipe.base or not self._parents[name].layout.outer_names("tower")
            else None
        )

    def _merge(
        self, recipe: Recipe, mixed: Mapping[int, Mix], first: int, outer: bool
    ) -> tuple[dict[int, Hop], int]:
        """Merges mixed layers, each into its first source's place of a skeleton, a further skeleton where that is taken.

        Equal mixes share a place, unless their numbers or masks depend on the position.
        """
        plan = merge.Merge(replace(recipe, scales=()), self._parents, self._known, self._device)
        shell = self._parents[recipe.base]
        steps: dict[int | None, list[tensor_plan.Step]] = {}
        for step in plan.steps:
            if step.mix is not None:
                steps.setdefault(shell.layout.place(step.name).layer, []).append(step)
        taken: Counter[int] = Counter()
        places: dict[Any, Hop] = {}
        hops: dict[int, Hop] = {}
        for position, mix in mixed.items():
            key = (mix, position if _depends_on_position(mix) else None)
            if key not in places:
                home = _index(mix.sources[0][1])
                skeleton = self._skeleton(first + taken[home])
                taken[home] += 1
                self._write(plan, steps[position], skeleton, functools.partial(_at_layer, shell, home))
                places[key] = Hop(skeleton.model, home)
            hops[position] = places[key]
        if outer:
            self._write(plan, steps.get(None, []), self._skeleton(first), lambda name: name)
        return hops, first

    def _write(
        self,
        plan: merge.Merge,
        steps: Sequence[tensor_plan.Step],
        skeleton: _Skeleton,
        place: Callable[[str], str],
    ) -> None:
        skeleton.holds = None
        with torch.no_grad():
            for step in steps:
                name = place(step.name)
                slot = skeleton.resident.slot(name, tensor_plan.DTYPES[plan.recipe.out_dtype])
                tensor = plan.tensor(step, slot)
                if tensor is not slot:
                    skeleton.resident.put(name, tensor)

    def _usual(self, outer: nn.Module, hops: Sequence[Hop], kinds: frozenset[str]) -> tuple[Hop, ...]:
        _, layers = decoder_layers.stack(outer)
        own = [hop for i in range(len(layers)) if self._kind(hop := Hop(outer, i)) in kinds]
        if {self._kind(hop) for hop in own} == kinds:
            return tuple(own)
        first = {self._kind(hop): replace(hop, gain=1.0) for hop in reversed(hops)}
        return tuple(first[kind] for kind in sorted(kinds))

    def _kind(self, hop: Hop) -> str:
        key = (id(hop.model), hop.layer)
        if key not in self._kinds:
            self._kinds[key] = layer_config.signature(hop.model, hop.layer)
        return self._kinds[key]

    # ---- skeletons ---------------------------------------------------------------------------------------------------------

    def _is_skeleton(self, recipe: Recipe) -> bool:
        """Whether a recipe is the base's shape, layer for layer, and its config says of them what the base's does."""
        depth = self._parents[self._base].layout.num_layers
        if len(recipe.layers) != depth or recipe.is_route({recipe.base: depth}):
            return False
        stages = dict.fromkeys(
            (name for name, _ in recipe.stages), self._parents[self._base]
        )  # which `_filled` gives the base's shape
        return layer_changes(recipe, {**self._parents, **stages}) is None

    def _filled(self, number: int, recipe: Recipe) -> _Skeleton:
        """The skeleton with a recipe's weights."""
        skeleton = self._skeleton(number)
        if skeleton.holds != recipe.id:
            skeleton.holds = None
            merge.merge_into(recipe, self._parents, skeleton.resident, self._known, self._device)
            skeleton.holds = recipe.id
        return skeleton

    def _skeleton(self, number: int) -> _Skeleton:
        while (
            len(self._skeletons) <= number
        ):  # the exception: stages and mixes in one recipe, or two mixes of one layer
            model = load_parent(self._files[self._base], self._dtype).to(self._device)
            self._skeletons.append(_Skeleton(model, WeightMap(model, self._parents[self._base].tensors)))
        return self._skeletons[number]


def _depends_on_position(mix: Mix) -> bool:
    """Whether a mix gives other tensors at another output layer: random masks, or filters that may name a layer."""
    values = [v for _, value in mix.params for v in (value if isinstance(value, tuple) else (value,))]
    digits = any(
        any(c.isdigit() for c in text) for v in values if isinstance(v, Filtered) for text, _ in v.cases
    )
    return digits or method(mix.method).randomized


def _at_layer(shell: Parent, layer: int, name: str) -> str:
    """The tensor of the same suffix in another layer."""
    return shell.layout.layer_name(layer, shell.layout.place(name).suffix)


def _index(layer: int | None) -> int:
    if layer is None:
        raise CandidateError("a layer of a route names no layer of its model")
    return layer


def _repeated(layers: Sequence[nn.Module]) -> int:
    """Parameters of the layers that share theirs with an earlier one: `parameters()` counts them once."""
    seen: set[int] = set()
    repeated = 0
    for layer in layers:
        own = {id(p): p.numel() for p in layer.parameters()}
        repeated += sum(n for i, n in own.items() if i in seen)
        seen |= set(own)
    return repeated
