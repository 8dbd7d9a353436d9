"""Recipe + parents -> merged tensors: one code path, into a live model, to disk, or as an iterator.

Under the policy 'float32' inputs are upcast, merged and rounded once to the recipe's out_dtype; under
'mergekit' the types and operations are mergekit's. What a worker scores is what
`evomerge.merging.checkpoint_writer` ships, bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from evomerge.checkpoints import Parent
from evomerge.checkpoints.values import check_tensor
from evomerge.errors import CandidateError, RecipeError
from evomerge.merging.candidate_launch import CandidateLaunches
from evomerge.merging.layer_devices import LayerDevices
from evomerge.merging.merge_plan import MergePlan, MergePlans, RecipeValues, make_plan, shape_and_numbers
from evomerge.merging.merged_config import layer_changes, merged_config
from evomerge.merging.merged_parent import MergedParent, check_intermediate
from evomerge.merging.row_weights import row_weights
from evomerge.merging.tensor_plan import DTYPES, Step, check
from evomerge.merging.vocabulary.embedding_tables import vocabulary_tensors
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import Method, Values, method, row_sums
from evomerge.methods.fused import MagnitudeTables, MergeInputs, combine_by_dot_products, merge_tensor
from evomerge.recipes import STORED, Mix, Recipe


class Merge:
    """A recipe, checked and planned from headers alone; `tensor` then merges one output at a time.

        for name, tensor in Merge(recipe, parents):
            ...

    Attributes:
        recipe: The recipe.
        parents: Name -> parent, intermediate merges of the recipe included.
        vocabulary: The output's vocabulary, None if the recipe keeps the base's rows.
        steps: The output tensors in order: embeddings, layers, head, other towers.
        plan: What the merge has in common with all of its shape.
        values: The values of the methods' parameters for each tensor.
    """

    def __init__(
        self,
        recipe: Recipe,
        parents: Mapping[str, Parent],
        tables: MagnitudeTables | None = None,
        device: str | LayerDevices = "cpu",
        plans: MergePlans | None = None,
    ) -> None:
        """Checks and plans; reads headers, configs and tokenizer files, no weights.

        Args:
            recipe: The recipe.
            parents: Name -> parent, for every model that the recipe reads.
            tables: Tables that a search shares between merges; they make merges faster and never different.
                None: empty ones.
            device: torch's name of the device that merges; with `LayerDevices` each merges its own layers.
            plans: Plans of these parents that a search shares between merges; they make planning faster and
                never different. None: planned anew.

        Raises:
            RecipeError: No method accepts the recipe, or it reads a model that is not there.
            CheckpointError: The parents' tensors do not fit together.
        """
        self.recipe = recipe
        self._magnitude_tables = tables or MagnitudeTables()
        self._device = device
        self.parents: dict[str, Parent] = dict(parents)
        planned = None if plans is None or recipe.scales else plans.find(recipe)
        if planned is None:
            planned = self._planned(plans)
        self.plan, self.values = planned
        self.vocabulary = self.plan.vocabulary
        self.steps: tuple[Step, ...] = self.plan.steps_of(recipe)
        self._numbers = {step.name: number for number, step in enumerate(self.steps)}

    def _planned(self, plans: MergePlans | None) -> tuple[MergePlan, RecipeValues]:
        """Checks the recipe and plans it anew."""
        recipe = self.recipe
        check(recipe)
        if recipe.scales:
            raise RecipeError(
                "a recipe with scales is written by the export of routes, which folds them into the weights; "
                "a merge has none"
            )
        for name, stage in recipe.stages:
            check_intermediate(name, stage)
            self.parents[name] = MergedParent(Merge(replace(stage, stages=()), self.parents))
        plan = make_plan(recipe, self.parents)
        if plans is not None:
            plans.keep(recipe, plan)
        return plan, RecipeValues(plan, shape_and_numbers(recipe)[1])

    @property
    def config(self) -> dict[str, Any]:
        """The merged model's config.json, see `merged_config`. Raises CheckpointError."""
        return merged_config(self.recipe, self.parents, self.vocabulary)

    def tensor(self, step: Step, out: Tensor | None = None) -> Tensor:
        """Merges one output tensor.

        Args:
            step: One of `steps`.
            out: Where to write it if possible: a contiguous tensor of the step's shape and the recipe's
                out_dtype on the merging device. None: a new tensor.

        Returns:
            The tensor; `out` itself only if it was used.

        Raises:
            CandidateError: A value of the result is not finite.
            CheckpointError: Since one of a parent is not.
        """
        if step.mix is None:
            tensor = self.parents[self.recipe.base].tensor(step.name)
            return tensor.to(DTYPES[self.recipe.out_dtype]) if tensor.is_floating_point() else tensor
        mix = step.mix
        inputs = self.inputs(step)
        if not inputs.sources[0].is_floating_point():
            return inputs.sources[0] if inputs.base is None else inputs.base
        rule = method(mix.method)
        values = self.values_of(step)
        merged, is_finite = self._merged(step, rule, inputs, values, out)
        if not is_finite:
            self.refuse(step)
        return merged

    def refuse(self, step: Step) -> NoReturn:
        """Says why a tensor cannot be merged whose result is not finite.

        Args:
            step: One of `steps`, with a mix.

        Raises:
            CandidateError: The values are merged to one that is not finite.
            CheckpointError: A value of a parent is not.
        """
        mix = step.mix
        assert mix is not None
        inputs = self.inputs(step)
        for (model, _), name, tensor in zip(mix.sources, step.inputs, inputs.sources, strict=True):
            check_tensor(model, name, tensor)
        if mix.base and step.base and inputs.base is not None:
            check_tensor(mix.base[0], step.base, inputs.base)
        raise CandidateError(
            f"merging gave a value that is not finite in tensor '{step.name}' "
            f"({mix.method} of {', '.join(mix.models)})"
        )

    def write(self, step: Step, name: str, weights: WeightMap) -> None:
        """Merges one output tensor into a live model, in place where its elements follow each other.

        Args:
            step: One of `steps`.
            name: Name on disk of the tensor that it is written to.
            weights: The live model.

        Raises:
            CandidateError: See `tensor`.
            CheckpointError: See `tensor`.
        """
        place = weights.run(name, DTYPES[self.recipe.out_dtype])
        tensor = self.tensor(step, place)
        if tensor is not place:
            weights.put(name, tensor)

    def mask_keys(self, step: Step) -> list[int]:
        """Keys of the random masks of one output tensor.

        Args:
            step: One of `steps`.

        Returns:
            One for each source of its mix, see `mask_key`.
        """
        models = [model for model, _ in step.mix.sources] if step.mix else []
        return [mask_key(self.recipe.seed, step.name, model) for model in models]

    def values_of(self, step: Step) -> Values:
        """The values of the method's parameters for one output tensor.

        Args:
            step: One of `steps`, with a mix.

        Returns:
            See `RecipeValues.of`.
        """
        return self.values.of(self._numbers[step.name])

    def number(self, step: Step) -> int:
        """The place of a step.

        Args:
            step: One of `steps`.

        Returns:
            Its index in `steps`.
        """
        return self._numbers[step.name]

    def combines(self, step: Step) -> bool:
        """Whether a step combines whole inputs with coefficients that come from their dot products.

        Args:
            step: One of `steps`.

        Returns:
            True if it is; such a merge needs no copies of its inputs.
        """
        rule = method(step.mix.method) if step.mix else None
        if rule is None or step.mix is None or rule.coefficients is None:
            return False
        vectors = len(step.inputs) + (not rule.base_is_origin)
        alike = [[1.0] * vectors] * vectors
        return rule.coefficients(alike, self.values_of(step)) is not None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Merges all tensors: (output tensor name, tensor of out_dtype), in the order of `steps`."""
        for step in self.steps:
            yield step.name, self.tensor(step)

    def inputs(self, step: Step) -> MergeInputs:
        """Reads what a step merges.

        Args:
            step: One of `steps`, with a mix.

        Returns:
            The tensors, on the merging device, with their rows aligned where the vocabulary changes; keys of
            masks; and what is known of the tensors is cached under.
        """
        assert step.mix is not None
        tensors, base = self._tensors(step, step.mix)
        return MergeInputs(tensors, base, self.mask_keys(step), *self._cache_ids(step))

    def _tensors(self, step: Step, mix: Mix) -> tuple[list[Tensor], Tensor | None]:
        """The sources and the base of a step, with their rows aligned where the vocabulary changes."""
        device = self._device_of(step)
        named = zip(mix.sources, step.inputs, strict=True)
        tensors = [self._read(model, name, device) for (model, _), name in named]
        base = self._read(mix.base[0], step.base, device) if mix.base and step.base else None
        if step.name in self.plan.resized and tensors[0].is_floating_point():
            tensors, base = self._aligned(mix, tensors, base)
        return tensors, base

    def _read(self, model: str, name: str, device: str) -> Tensor:
        tensor = self.parents[model].tensor(name)
        if str(tensor.device) == device or tensor.device.type == device:
            return tensor
        return tensor.to(device, non_blocking=True)

    def _device_of(self, step: Step) -> str:
        """Where a step is merged: with several cards, where the layer of its inputs lies."""
        if isinstance(self._device, str):
            return self._device
        name = step.inputs[0] if step.inputs else step.name
        return self._device.of(self.parents[self.recipe.base].layout.place(name).layer)

    def _merged(
        self, step: Step, rule: Method, inputs: MergeInputs, values: Values, out: Tensor | None
    ) -> tuple[Tensor, bool]:
        """(the merged tensor in out_dtype, whether it is finite)."""
        dtype = DTYPES[self.recipe.out_dtype]
        if self.recipe.policy == "mergekit":
            merged = self._as_mergekit(rule, inputs, values).to(dtype)
            return merged, bool(torch.isfinite(merged).all())
        if rule.task_vector_sum is not None or rule.coefficients is not None:
            if out is None:
                out = torch.empty(step.info.shape, dtype=dtype, device=self._device_of(step))
            weights = row_weights(step)
            if weights is not None:
                return out, row_sums.merge_rows(inputs.sources, inputs.base, values, weights, out)
            if rule.task_vector_sum is not None:
                return out, merge_tensor(rule.task_vector_sum, inputs, values, out, self._magnitude_tables)
            is_finite = combine_by_dot_products(rule, inputs, values, out, self._magnitude_tables)
            if is_finite is not None:
                return out, is_finite
        sources = [tensor.float() for tensor in inputs.sources]
        base = None if inputs.base is None else inputs.base.float()
        merged = rule.kernel(sources, base, values, inputs.mask_keys).to(dtype)
        return merged, bool(torch.isfinite(merged).all())

    def _as_mergekit(self, rule: Method, inputs: MergeInputs, values: Values) -> Tensor:
        """The merged tensor by mergekit's types and operations."""
        sources, base = inputs.sources, inputs.base
        if self.recipe.dtype == STORED:
            types = [tensor.dtype for tensor in (*sources, *([] if base is None else [base]))]
            dtype = functools.reduce(torch.promote_types, types)
        else:
            dtype = DTYPES[self.recipe.dtype]
        return rule.kernel(
            [tensor.to(dtype) for tensor in sources],
            None if base is None else base.to(dtype),
            values,
            inputs.mask_keys,
            mergekit_compatible=True,
        )

    def _aligned(
        self, mix: Mix, tensors: Sequence[Tensor], base: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tensors with the output's rows; averaged in the arithmetic type, as mergekit does."""
        assert self.vocabulary is not None
        dtype = DTYPES.get(self.recipe.dtype)
        tables = {
            model: tensor.to(dtype) if dtype else tensor
            for (model, _), tensor in zip(mix.sources, tensors, strict=True)
        }
        base_name = mix.base[0] if mix.base else None
        if base_name is not None and base is not None:
            tables.setdefault(base_name, base.to(dtype) if dtype else base)
        aligned = self.vocabulary.align(tables, base=base_name)
        sources = [aligned[model].contiguous() for model, _ in mix.sources]
        return sources, None if base_name is None else aligned[base_name].contiguous()

    def _cache_ids(self, step: Step) -> tuple[list[Hashable], Hashable]:
        """(for each source what `MagnitudeTables` caches its tensor under, the same for the base).

        None where an intermediate merge makes the tensor, or the vocabulary's rows are aligned: those are the
        recipe's own.
        """
        if step.mix is None or step.name in self.plan.resized:
            return [], None
        passing = {name for name, _ in self.recipe.stages}
        sources = zip(step.mix.sources, step.inputs, strict=True)
        ids: list[Hashable] = [None if model in passing else (model, name) for (model, _), name in sources]
        base = step.mix.base
        return ids, None if base is None or base[0] in passing else (base[0], step.base)


def merged_tensors(recipe: Recipe, parents: Mapping[str, Parent]) -> Iterator[tuple[str, Tensor]]:
    """Merges all tensors of a recipe, one at a time.

    Args:
        recipe: The recipe.
        parents: Name -> parent, for every model that the recipe reads.

    Yields:
        (output tensor name, tensor of out_dtype), in the order of `Merge.steps`.

    Raises:
        RecipeError: No method accepts the recipe.
        CheckpointError: The parents' tensors do not fit together.
        CandidateError: A value of the result is not finite.
    """
    yield from Merge(recipe, parents)


def merge_into(
    recipe: Recipe,
    parents: Mapping[str, Parent],
    weights: WeightMap,
    tables: MagnitudeTables | None = None,
    device: str | LayerDevices = "cpu",
    plans: MergePlans | None = None,
) -> None:
    """Merges into a live model of the base's architecture, in place where a tensor is a whole parameter.

    Args:
        recipe: A recipe of the base's depth, layer configs and vocabulary.
        parents: Name -> parent, for every model that the recipe reads.
        weights: The live model, which holds the base's other towers already.
        tables: Tables that a search shares between merges, None for empty ones.
        device: torch's name of the device that merges; with `LayerDevices` each merges its own layers.
        plans: Plans that a search shares between merges, None for none. Where they have `launches`, whether
            values are finite is told by `CandidateLaunches.check`.

    Raises:
        CandidateError: The merged model would have another shape than the live one, or a value is not finite.
    """
    depth = parents[recipe.base].layout.num_layers
    if len(recipe.layers) != depth:
        raise CandidateError(
            f"the recipe has {len(recipe.layers)} layers, the live model {depth}; a search keeps the "
            "base's depth"
        )
    merge = Merge(recipe, parents, tables, device, plans)
    if layer_changes(recipe, merge.parents) is not None:
        raise CandidateError(
            "the configs of the recipe's models say other things of its layers than the base's, which a "
            "live model has"
        )
    if merge.vocabulary is not None:
        base = parents[recipe.base]
        if merge.vocabulary.size != len(base.tensor(vocabulary_tensors(base)[0])):
            raise CandidateError(
                "the recipe's tokenizer changes the number of rows; a search keeps the base's vocabulary"
            )
    steps = [(step, step.name) for step in merge.steps if step.mix is not None]
    write_steps(merge, steps, weights, None if plans is None else plans.launches)


def write_steps(
    merge: Merge,
    steps: Sequence[tuple[Step, str]],
    weights: WeightMap,
    launches: CandidateLaunches | None = None,
) -> None:
    """Merges tensors into a live model.

    Args:
        merge: The merge.
        steps: (step of the merge, name on disk of the tensor that it is written to).
        weights: The live model.
        launches: What merges them at once, and tells whether values are finite; None for one after the other.

    Raises:
        CandidateError: A value of the result is not finite.
    """
    if launches is not None:
        launches.write(merge, steps, weights)
        return
    with torch.no_grad():
        for step, name in steps:
            merge.write(step, name, weights)


def mask_key(seed: int, tensor: str, model: str) -> int:
    """Key of a random mask: a function of recipe seed, output tensor and parent, and of nothing else.

    Args:
        seed: Seed of the recipe.
        tensor: Name of the output tensor.
        model: Name of the parent.

    Returns:
        A signed 64-bit number.
    """
    digest = hashlib.blake2b(f"{seed}\x1f{tensor}\x1f{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
