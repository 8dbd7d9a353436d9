"""A recipe made live: the module that computes it, over models loaded once. Knows nothing of scoring.

A weight merge of the base's shape is written into a skeleton, a copy of the base. Any other recipe is a
route: layers of parents stay where they are and are taken by reference, merged ones come from a skeleton.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints import Parent
from evomerge.errors import EvomergeError
from evomerge.merging.candidate_launch import CandidateLaunches
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.layer_devices import LayerDevices, place_model
from evomerge.merging.merge import Merge, merge_into, write_steps
from evomerge.merging.merge_plan import MergePlans
from evomerge.merging.merged_config import layer_changes
from evomerge.merging.model_loading import load_parent
from evomerge.merging.routing import checks, decoder_layers, plain_checkpoint, routed_model
from evomerge.merging.routing.fingerprint import signature
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from evomerge.merging.tensor_plan import Step, layer_index
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import method
from evomerge.methods.fused import MagnitudeTables
from evomerge.methods.fused.table_sums import is_one_call
from evomerge.recipes import Filtered, Mix, PerRow, Recipe


@dataclass(frozen=True, slots=True)
class CandidateModel:
    """A candidate's module.

    Attributes:
        module: The module.
        routed: The routed model that it belongs to, None for the skeleton itself.
        hops: The candidate's route.
        reference_hops: A route of the same kinds of layers that is the same for every candidate, on which
            optimizations of the evaluation are verified.
    """

    module: nn.Module
    routed: RoutedModel | None = None
    hops: tuple[Hop, ...] = ()
    reference_hops: tuple[Hop, ...] = ()

    def install_reference(self) -> None:
        """Makes the module the reference route; nothing for the skeleton."""
        if self.routed is not None:
            self.routed.install(self.reference_hops)

    def install(self) -> None:
        """Makes the module the candidate; nothing for the skeleton, which is it already."""
        if self.routed is not None:
            self.routed.install(self.hops)


@dataclass(slots=True)
class _Skeleton:
    """A model that merges are written into.

    recipe_id: of the recipe whose weights it has, None if they are not one recipe's.
    """

    model: nn.Module
    weights: WeightMap
    recipe_id: str | None = None


class ModelBuilder:
    """The models of one worker: recipe -> module.

    builder = ModelBuilder(parents, parents, "base", skeleton, "bfloat16", "cpu", MagnitudeTables())
    candidate = builder.build(recipe)
    candidate.install()
    logits = candidate.module(input_ids=tokens).logits
    """

    def __init__(
        self,
        files: Mapping[str, Parent],
        parents: Mapping[str, Parent],
        base: str,
        skeleton: nn.Module,
        dtype: str,
        device: str | LayerDevices,
        tables: MagnitudeTables,
    ) -> None:
        """Takes over the loaded base; other models are loaded when a recipe needs them.

        Args:
            files: Name -> parent, as it is on disk.
            parents: The same where merges read them, see `evomerge.merging.parent_placement`.
            base: Name of the base.
            skeleton: The base, loaded on the device; it is written to.
            dtype: torch's name of the type of the tensors that are scored and shipped.
            device: torch's name of the device, or those of several cards with their layers.
            tables: Tables that merges share.

        Raises:
            CheckpointError: The base's tensors do not fit the skeleton.
        """
        self._files = files
        self._parents = parents
        self._base = base
        self._dtype = dtype
        self._device = device
        self._tables = tables
        # over several cards merges are made tensor by tensor, each on its layer's card
        is_launched = isinstance(device, str) and is_one_call(torch.device(device))
        launches = CandidateLaunches(tables) if is_launched else None
        self._plans = MergePlans(parents, launches)
        self._skeletons = [self._made_skeleton(skeleton)]
        self._models: dict[str, nn.Module] = {}
        self._routed: dict[tuple[int, frozenset[str]], RoutedModel] = {}
        self._kinds: dict[tuple[int, int], str] = {}
        self._reasons: dict[tuple[int, tuple[str, ...]], tuple[str, ...]] = {}

    def build(self, recipe: Recipe, *, checked: bool = True) -> CandidateModel:
        """Builds the module of a recipe; `CandidateModel.install` makes it ready.

        Args:
            recipe: The recipe.
            checked: Whether to wait for the device until every value is known to be finite; else
                `check_values` has to be asked before anything that the module computed is believed.

        Returns:
            The candidate, valid until the next recipe is built.

        Raises:
            RouteError: Layers do not fit together.
            CandidateError: A merge fails.
            RecipeError: No method accepts the recipe.
        """
        with suppress(EvomergeError):  # of a candidate before, which failed otherwise
            self.check_values()
        candidate = self._built(recipe)
        if checked or self._device == "cpu":  # where results are there already
            self.check_values()
        return candidate

    def check_values(self) -> None:
        """Reads whether the merged values of the last candidate are finite, where `build` did not.

        Raises:
            CandidateError: A value is not; names the tensor.
            CheckpointError: Since one of a parent is not.
        """
        if self._plans.launches is None:
            return
        try:
            self._plans.launches.check()
        except EvomergeError:
            for skeleton in self._skeletons:
                skeleton.recipe_id = None
            raise

    def _built(self, recipe: Recipe) -> CandidateModel:
        if self._has_base_shape(recipe):
            self._skeletons[
                0
            ].recipe_id = None  # each candidate is merged anew, whatever the one before left behind
            return CandidateModel(self._filled(0, recipe).model)
        intermediate = {
            name: self._filled(number, stage).model for number, (name, stage) in enumerate(recipe.stages)
        }
        hops, outer = self._hops(recipe, intermediate)
        gains = routed_model.gains(recipe.scales, len(hops))
        hops = [replace(hop, gain=gain) for hop, gain in zip(hops, gains, strict=True)]
        kinds = frozenset(self._kind(hop) for hop in hops)
        key = (id(outer), kinds)
        if key not in self._routed:
            self._routed[key] = RoutedModel(outer, list(dict.fromkeys(hop.model for hop in hops)))
        routed = self._routed[key]
        return CandidateModel(routed.model, routed, tuple(hops), self._reference_hops(outer, hops, kinds))

    def reasons(self, candidate: CandidateModel) -> tuple[str, ...]:
        """Why an installed candidate is not a plain checkpoint.

        Args:
            candidate: The candidate, whose module is installed.

        Returns:
            Sentences; none for a plain checkpoint.
        """
        if candidate.routed is None:
            return ()
        key = (id(candidate.routed), tuple(self._kind(hop) for hop in candidate.hops))
        if key not in self._reasons:
            self._reasons[key] = plain_checkpoint.reasons(candidate.routed)
        return self._reasons[key]

    def costs(self, candidate: CandidateModel) -> dict[str, float]:
        """The size of an installed candidate as it is shipped.

        Args:
            candidate: The candidate, whose module is installed.

        Returns:
            'layers' and 'parameters'; a layer taken twice counts twice.
        """
        _, layers = decoder_layers.stack(candidate.module)
        unique = sum(parameter.numel() for parameter in candidate.module.parameters())
        return {"layers": float(len(layers)), "parameters": float(unique + _repeated(list(layers)))}

    def check_routable(self, names: Sequence[str], scaled: bool) -> None:
        """Checks by structure and by numbers that layers of models can be routed.

        Args:
            names: The models; the first gives the shell.
            scaled: Whether hidden states are to be scaled too.

        Raises:
            RouteError: The layers cannot be routed.
            FoldError: A layer cannot take up a gain.
        """
        models = {name: self.model(name) for name in names}
        checks.check_routable(models, names[0])
        for model in models.values():
            checks.check_routable_numerically(model)
        if scaled:
            for model in models.values():
                checks.check_scalable(model)

    def model(self, name: str) -> nn.Module:
        """A parent as a live model, loaded at first use.

        Args:
            name: Name of the parent.

        Returns:
            The model, which is never written to.

        Raises:
            CheckpointError: It cannot be loaded.
        """
        if name not in self._models:
            self._models[name] = place_model(load_parent(self._files[name], self._dtype), self._device)
        return self._models[name]

    # ---- a route's layers ----

    def _hops(self, recipe: Recipe, intermediate: Mapping[str, nn.Module]) -> tuple[list[Hop], nn.Module]:
        """The route, and the model whose embeddings and head it has."""
        hops: dict[int, Hop] = {}
        mixed: dict[int, Mix] = {}
        for position, mix in enumerate(recipe.layers):
            source = mix.passed
            if source is None:
                mixed[position] = mix
            else:
                name, layer = source
                model = intermediate[name] if name in intermediate else self.model(name)
                hops[position] = Hop(model, layer_index(layer))
        outer = self._outer_model(recipe, intermediate)
        if mixed or outer is None:
            first = len(intermediate)
            hops |= self._merge(recipe, mixed, first, merge_outer=outer is None)
            if outer is None:
                outer = self._skeleton(first).model
        return [hops[position] for position in range(len(recipe.layers))], outer

    def _outer_model(self, recipe: Recipe, intermediate: Mapping[str, nn.Module]) -> nn.Module | None:
        """The model whose tensors outside the stack a recipe takes over whole, None if it mixes them."""
        embeddings, head = recipe.embeddings.passed, recipe.head.passed
        if embeddings is None or head is None or embeddings[0] != head[0]:
            return None
        name = embeddings[0]
        if name in intermediate:
            return intermediate[name]
        has_towers = bool(self._parents[name].layout.outer_names("tower"))
        return None if has_towers and name != recipe.base else self.model(name)

    def _merge(
        self, recipe: Recipe, mixed: Mapping[int, Mix], first: int, merge_outer: bool
    ) -> dict[int, Hop]:
        """Merges mixed layers, each into its first source's place of a skeleton that is free there.

        Equal mixes share a place, unless their numbers or masks depend on the position. mixed: position ->
        mix; first: number of the first skeleton that may be used; merge_outer: whether what is outside the
        stack is merged too.
        """
        plan = Merge(replace(recipe, scales=()), self._parents, self._tables, self._device, self._plans)
        layout = self._parents[recipe.base].layout
        steps: dict[int | None, list[Step]] = {}
        for step in plan.steps:
            if step.mix is not None:
                steps.setdefault(layout.place(step.name).layer, []).append(step)
        taken: Counter[int] = Counter()
        places: dict[Any, Hop] = {}
        hops: dict[int, Hop] = {}
        for position, mix in mixed.items():
            key = (mix, position if _depends_on_position(mix) else None)
            if key not in places:
                layer = layer_index(mix.sources[0][1])
                skeleton = self._skeleton(first + taken[layer])
                taken[layer] += 1
                skeleton.recipe_id = None
                targets = [
                    (step, layout.layer_name(layer, layout.place(step.name).suffix))
                    for step in steps[position]
                ]
                write_steps(plan, targets, skeleton.weights, self._plans.launches)
                places[key] = Hop(skeleton.model, layer)
            hops[position] = places[key]
        if merge_outer:
            skeleton = self._skeleton(first)
            skeleton.recipe_id = None
            outer = [(step, step.name) for step in steps.get(None, [])]
            write_steps(plan, outer, skeleton.weights, self._plans.launches)
        return hops

    def _reference_hops(
        self, outer: nn.Module, hops: Sequence[Hop], kinds: frozenset[str]
    ) -> tuple[Hop, ...]:
        """The outer model's layers of these kinds; if they lack a kind, one of each from the route."""
        _, layers = decoder_layers.stack(outer)
        own = [Hop(outer, i) for i in range(len(layers))]
        own = [hop for hop in own if self._kind(hop) in kinds]
        if {self._kind(hop) for hop in own} == kinds:
            return tuple(own)
        first_of_kind = {self._kind(hop): replace(hop, gain=1.0) for hop in reversed(hops)}
        return tuple(first_of_kind[kind] for kind in sorted(kinds))

    def _kind(self, hop: Hop) -> str:
        key = (id(hop.model), hop.layer)
        if key not in self._kinds:
            self._kinds[key] = signature(hop.model, hop.layer)
        return self._kinds[key]

    # ---- skeletons ----

    def coefficient_slopes(self, recipe: Recipe) -> CoefficientSlopes:
        """What takes the gradients of the skeleton that a recipe of the base's shape was just built in.

        Args:
            recipe: That recipe.

        Returns:
            The slopes, to be entered.

        Raises:
            CandidateError: A method of the recipe has no known derivatives.
        """
        merge = Merge(recipe, self._parents, self._tables, self._device, self._plans)
        return CoefficientSlopes(merge, self._skeletons[0].weights)

    def _has_base_shape(self, recipe: Recipe) -> bool:
        """Whether a recipe has the base's shape, layer for layer, and its layers the base's config."""
        base = self._parents[self._base]
        depth = base.layout.num_layers
        if len(recipe.layers) != depth or recipe.is_route({recipe.base: depth}):
            return False
        intermediate = dict.fromkeys(
            (name for name, _ in recipe.stages), base
        )  # `_filled` gives them its shape
        return layer_changes(recipe, {**self._parents, **intermediate}) is None

    def _filled(self, number: int, recipe: Recipe) -> _Skeleton:
        """The skeleton with a recipe's weights."""
        skeleton = self._skeleton(number)
        if skeleton.recipe_id != recipe.id:
            skeleton.recipe_id = None
            merge_into(recipe, self._parents, skeleton.weights, self._tables, self._device, self._plans)
            skeleton.recipe_id = recipe.id
        return skeleton

    def _skeleton(self, number: int) -> _Skeleton:
        """A skeleton, loaded at first use.

        There is more than one for intermediate and other merges in one recipe, or two mixes of one layer.
        """
        while len(self._skeletons) <= number:
            model = place_model(load_parent(self._files[self._base], self._dtype), self._device)
            self._skeletons.append(self._made_skeleton(model))
        return self._skeletons[number]

    def _made_skeleton(self, model: nn.Module) -> _Skeleton:
        """A skeleton of a loaded base, in an arena where merges are launched on a device."""
        weights = WeightMap(model, self._parents[self._base].tensors)
        if self._plans.launches is not None and self._device != "cpu":
            weights.use_arena()
        return _Skeleton(model, weights)


def _depends_on_position(mix: Mix) -> bool:
    """Whether a mix differs between output layers: it has random masks, or filters that may name a layer."""
    if method(mix.method).randomized:
        return True
    settings = [s for _, value in mix.params for s in (value if isinstance(value, tuple) else (value,))]
    filters = [text for s in settings if isinstance(s, Filtered | PerRow) for text, _ in s.cases]
    return any(character.isdigit() for text in filters for character in text)


def _repeated(layers: Sequence[nn.Module]) -> int:
    """Parameters of the layers that share theirs with an earlier one: `parameters()` counts them once."""
    counted: set[int] = set()
    repeated = 0
    for layer in layers:
        sizes = {id(parameter): parameter.numel() for parameter in layer.parameters()}
        repeated += sum(size for key, size in sizes.items() if key in counted)
        counted |= set(sizes)
    return repeated
