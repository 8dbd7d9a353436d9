"""Recipe + parents -> merged tensors: one code path, into a live model, to disk, or as an iterator.

Under the policy 'float32' inputs are upcast, merged and rounded once to the recipe's out_dtype; under 'mergekit' the
types and operations are mergekit's. What a worker scores is what `evomerge.merging.checkpoint_writer` ships, bit for bit.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import Parent, Place
from evomerge.checkpoints.parent import equal
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CandidateError, CheckpointError, RecipeError, suggest
from evomerge.merging.routing import layer_config
from evomerge.merging.routing.layer_config import Changes
from evomerge.merging.tensor_plan import DTYPE_CODES, DTYPES, Step, check
from evomerge.merging.vocabulary.alignment import Vocabulary, vocabulary_tensors
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import Method, Values, method
from evomerge.methods.fused import MagnitudeTables, MergeInputs, combine_by_dot_products, merge_tensor
from evomerge.recipes import STORED, Filtered, Mix, Recipe, Setting


class Merge:
    """A recipe that has been checked and planned from headers alone; `tensor` then merges one output at a time."""

    def __init__(
        self,
        recipe: Recipe,
        parents: Mapping[str, Parent],
        known: MagnitudeTables | None = None,
        device: str = "cpu",
    ) -> None:
        """known: tables of a search, which make merges faster and never different.

        Raises RecipeError for a recipe no method accepts, CheckpointError for parents whose tensors do not fit together.
        """
        check(recipe)
        if recipe.scales:
            raise RecipeError(
                "a recipe with scales is written by the export of routes, which folds them into the weights; a merge has none"
            )
        self.recipe, self.known, self.device = recipe, known or MagnitudeTables(), device
        self.parents: dict[str, Parent] = dict(parents)
        for name, stage in recipe.stages:
            self.parents[name] = MergedParent(name, replace(stage, stages=()), dict(self.parents))
        for name in recipe.reads:
            if name not in self.parents:
                raise RecipeError(
                    f"the recipe reads model '{name}', which is not there. {suggest(name, self.parents)}"
                )
        self.vocabulary = _vocabulary(recipe, self.parents)
        self._tables = (
            frozenset(vocabulary_tensors(self.parents[recipe.base])) if self.vocabulary else frozenset()
        )
        self.steps = tuple(_steps(recipe, self.parents, self.vocabulary, self._tables))

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the merged model: the base's, with depth, values of each layer, vocabulary and dtype of the recipe.

        Raises CheckpointError where models say different things of their layers that cannot be brought together.
        """
        donor = self.parents[self.recipe.base]
        config = self.vocabulary.config(donor.config) if self.vocabulary else copy.deepcopy(donor.config)
        text = config.get("text_config", config)
        text["n_layer" if "n_layer" in text else "num_hidden_layers"] = len(self.recipe.layers)
        changed = layer_changes(self.recipe, self.parents)
        if changed is not None:
            layer_config.write_file(config, changed)
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = self.recipe.out_dtype
        return config

    def tensor(self, step: Step, out: Tensor | None = None) -> Tensor:
        """The merged tensor of a step, in `out` where it is given and can be used: contiguous, of the step's shape and out_dtype.

        Raises CandidateError if it comes out with a value that is not finite.
        """
        dtype = DTYPES[self.recipe.out_dtype]
        if step.mix is None:
            taken = self.parents[self.recipe.base].tensor(step.name)
            return taken.to(dtype) if taken.is_floating_point() else taken
        mix, rule = step.mix, method(step.mix.method)
        tensors = [self._read(model, name) for (model, _), name in zip(mix.sources, step.inputs, strict=True)]
        base = self._read(mix.base[0], step.base) if mix.base and step.base else None
        if not tensors[0].is_floating_point():
            return base if base is not None else tensors[0]
        if self.vocabulary is not None and step.name in self._tables:
            tensors, base = self._aligned(mix, tensors, base)
        values = _values(rule, mix, step.name, step.inputs)
        keys = [mask_key(self.recipe.seed, step.name, model) for model, _ in mix.sources]
        if self.recipe.policy == "mergekit":
            merged = self._as_mergekit(rule, tensors, base, values, keys).to(dtype)
            finite = bool(torch.isfinite(merged).all())
        elif rule.task_vector_sum is not None:
            merged = torch.empty(step.info.shape, dtype=dtype, device=self.device) if out is None else out
            inputs = MergeInputs(tensors, base, keys, self._cache_ids(step))
            finite = merge_tensor(rule.task_vector_sum, inputs, values, merged, self.known)
        elif (
            rule.coefficients is not None
            and (done := self._by_angles(step, rule, tensors, base, values, out)) is not None
        ):
            merged, finite = done
        else:
            merged = rule.kernel(
                [t.float() for t in tensors], None if base is None else base.float(), values, keys
            ).to(dtype)
            finite = bool(torch.isfinite(merged).all())
        if not finite:
            raise CandidateError(
                f"merging gave a value that is not finite in tensor '{step.name}' ({mix.method} of {', '.join(mix.models)})"
            )
        return merged

    def combines(self, step: Step) -> bool:
        """Whether a step's result is a combination of its inputs whose coefficients come from their dot products."""
        rule = method(step.mix.method) if step.mix else None
        if rule is None or step.mix is None or rule.coefficients is None:
            return False
        vectors = len(step.inputs) + (not rule.base_is_origin)
        alike = [[1.0] * vectors] * vectors
        return rule.coefficients(alike, _values(rule, step.mix, step.name, step.inputs)) is not None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(output tensor name, tensor of out_dtype), one at a time: embeddings, layers in order, head, other towers."""
        for step in self.steps:
            yield step.name, self.tensor(step)

    def _read(self, model: str, name: str) -> Tensor:
        tensor = self.parents[model].tensor(name)
        return tensor if tensor.device.type == self.device else tensor.to(self.device, non_blocking=True)

    def _as_mergekit(
        self,
        rule: Method,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        values: Values,
        keys: Sequence[int],
    ) -> Tensor:
        kinds = [t.dtype for t in (*tensors, *([] if base is None else [base]))]
        dtype = (
            functools.reduce(torch.promote_types, kinds)
            if self.recipe.dtype == STORED
            else DTYPES[self.recipe.dtype]
        )
        return rule.kernel(
            [t.to(dtype) for t in tensors],
            None if base is None else base.to(dtype),
            values,
            keys,
            mergekit_compatible=True,
        )

    def _by_angles(
        self,
        step: Step,
        rule: Method,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        values: Values,
        out: Tensor | None,
    ) -> tuple[Tensor, bool] | None:
        merged = (
            torch.empty(step.info.shape, dtype=DTYPES[self.recipe.out_dtype], device=self.device)
            if out is None
            else out
        )
        finite = combine_by_dot_products(rule, MergeInputs(tensors, base), values, merged)
        return None if finite is None else (merged, finite)

    def _aligned(
        self, mix: Mix, tensors: Sequence[Tensor], base: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tensors with the output vocabulary's rows. As in mergekit, rows are averaged in the arithmetic type."""
        assert self.vocabulary is not None
        dtype = DTYPES.get(self.recipe.dtype)
        tables = {
            model: t.to(dtype) if dtype else t for (model, _), t in zip(mix.sources, tensors, strict=True)
        }
        if mix.base is not None and base is not None:
            tables.setdefault(mix.base[0], base.to(dtype) if dtype else base)
        found = self.vocabulary.aligned(tables, base=mix.base[0] if mix.base else None)
        return [found[model].contiguous() for model, _ in mix.sources], found[
            mix.base[0]
        ].contiguous() if mix.base else None

    def _cache_ids(self, step: Step) -> list[Hashable]:
        """For each source, what `MagnitudeTables` caches its difference from the base under.

        None where a stage makes one of the two tensors, or the vocabulary's rows are aligned: those are the recipe's own.
        """
        if step.mix is None or step.mix.base is None:
            return []
        stages, base = {name for name, _ in self.recipe.stages}, step.mix.base[0]
        ids: list[Hashable] = []
        for (model, _), name in zip(step.mix.sources, step.inputs, strict=True):
            lasting = step.name not in self._tables and not stages & {model, base}
            ids.append((model, name, base, step.base) if lasting else None)
        return ids


class MergedParent:
    """A merged model as a parent of another merge: its tensors are merged when they are read."""

    def __init__(self, name: str, recipe: Recipe, parents: Mapping[str, Parent]) -> None:
        if recipe.tokenizer is not None or recipe.chat_template is not None:
            raise RecipeError(
                f"stage '{name}' has a tokenizer or chat template of its own; merge it to a folder first, or give it to the last stage"
            )
        self._merge = Merge(recipe, parents)
        donor = self._merge.parents[recipe.base]
        self._steps = {step.name: step for step in self._merge.steps}
        self.path, self.stack, self.dtype, self.num_layers = (
            donor.path,
            donor.stack,
            recipe.out_dtype,
            len(recipe.layers),
        )
        self.config = self._merge.config
        self.tensors: dict[str, TensorInfo] = {name: step.info for name, step in self._steps.items()}
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self.largest = max(info.nbytes for info in self.tensors.values())
        self.files = tuple({file: None for name in recipe.reads for file in self._merge.parents[name].files})
        self._donor = donor
        self._suffixes: dict[int, tuple[str, ...]] = {}
        for tensor in self.tensors:
            place = donor.place(tensor)
            if place.layer is not None:
                self._suffixes[place.layer] = tuple(
                    sorted((*self._suffixes.get(place.layer, ()), place.suffix))
                )

    def tensor(self, name: str) -> Tensor:
        """The merged tensor of that name."""
        if name not in self._steps:
            raise CheckpointError(f"the stage merged on {self.path} has no tensor '{name}'")
        return self._merge.tensor(self._steps[name])

    def place(self, name: str) -> Place:
        """Part, layer and component that a tensor's name says."""
        return self._donor.place(name)

    def layer_name(self, layer: int, suffix: str) -> str:
        """Full name of a layer's tensor."""
        return self._donor.layer_name(layer, suffix)

    def layer_suffixes(self, layer: int) -> tuple[str, ...]:
        """Names after 'stack.N.' of one layer's tensors, sorted."""
        if layer not in self._suffixes:
            raise CheckpointError(
                f"the stage merged on {self.path} has no layer {layer}; its layers are 0 to {self.num_layers - 1}"
            )
        return self._suffixes[layer]

    def outer_names(self, part: str) -> tuple[str, ...]:
        """Names of the tensors of one part outside the stack, sorted."""
        return tuple(sorted(name for name in self.tensors if self.place(name).part == part))

    def content_hash(self) -> str:
        """SHA-256 over the recipe and its parents' content."""
        parts = [
            self._merge.recipe.canonical(),
            *(self._merge.parents[m].content_hash() for m in self._merge.recipe.reads),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def equal_tensors(self, other: Parent) -> Iterator[str]:
        """Names of the tensors that are the same in both."""
        return equal(self, other)


def merged(recipe: Recipe, parents: Mapping[str, Parent]) -> Iterator[tuple[str, Tensor]]:
    """(output tensor name, tensor of out_dtype), one at a time; see `Merge`."""
    yield from Merge(recipe, parents)


def into(
    recipe: Recipe,
    parents: Mapping[str, Parent],
    resident: WeightMap,
    known: MagnitudeTables | None = None,
    device: str = "cpu",
) -> None:
    """Merges into a live model of the base's architecture, in place where a tensor has a place of its own."""
    depth = parents[recipe.base].num_layers
    if len(recipe.layers) != depth:
        raise CandidateError(
            f"the recipe has {len(recipe.layers)} layers, the resident model {depth}; a search keeps the base's depth"
        )
    merge = Merge(recipe, parents, known, device)
    if layer_changes(recipe, merge.parents) is not None:
        raise CandidateError(
            "the configs of the recipe's models say other things of its layers than the base's, which a resident model has"
        )
    if merge.vocabulary is not None and merge.vocabulary.size != len(
        parents[recipe.base].tensor(vocabulary_tensors(parents[recipe.base])[0])
    ):
        raise CandidateError(
            "the recipe's tokenizer changes the number of rows; a search keeps the base's vocabulary"
        )
    with torch.no_grad():
        for step in merge.steps:
            if step.mix is not None:  # the resident model holds the base's other towers already
                slot = resident.slot(step.name, DTYPES[recipe.out_dtype])
                tensor = merge.tensor(step, slot)
                if tensor is not slot:
                    resident.put(step.name, tensor)


def layer_changes(recipe: Recipe, parents: Mapping[str, Parent]) -> Changes | None:
    """What a recipe's layers change in the text config of its base, None for nothing.

    A layer that is taken over has its own model's values. A mixed one has the base's, at the number of its first source, as
    where it is scored; its first source's where the base is not as deep.
    """
    depth = parents[recipe.base].num_layers
    homes = []
    for mix in recipe.layers:
        model, number = mix.sources[0]
        layer = _index(number)
        homes.append((model if mix.passed or layer >= depth else recipe.base, layer))
    if homes == [(recipe.base, i) for i in range(depth)]:
        return None
    names = dict.fromkeys([recipe.base, *(model for model, _ in homes)])
    configs = {
        name: layer_config.of_file(name, parents[name].config, parents[name].num_layers) for name in names
    }
    changed = layer_config.gathered(configs[recipe.base], [(configs[model], layer) for model, layer in homes])
    return None if layer_config.is_unchanged(configs[recipe.base], changed) else changed


def mask_key(seed: int, tensor: str, model: str) -> int:
    """Signed 64-bit key of a random mask: a function of recipe seed, output tensor name and parent, nothing else."""
    digest = hashlib.blake2b(f"{seed}\x1f{tensor}\x1f{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _steps(
    recipe: Recipe, parents: Mapping[str, Parent], vocabulary: Vocabulary | None, tables: frozenset[str]
) -> Iterator[Step]:
    """Every output tensor in order, its inputs found and their shapes compared, from headers alone."""
    shell = parents[recipe.base]
    for name in shell.outer_names("embeddings"):
        yield _step(recipe, parents, recipe.embeddings, name, None, vocabulary, tables)
    for depth, mix in enumerate(recipe.layers):
        read = [(model, index) for model, index in (*mix.sources, *([mix.base] if mix.base else ()))]
        suffixes = {
            suffix for model, index in read for suffix in parents[model].layer_suffixes(_index(index))
        }
        for suffix in sorted(suffixes):
            yield _step(recipe, parents, mix, shell.layer_name(depth, suffix), suffix, vocabulary, tables)
    for name in shell.outer_names("head"):
        yield _step(recipe, parents, recipe.head, name, None, vocabulary, tables)
    for name in shell.outer_names("tower"):
        yield Step(name, _header(shell.tensors[name], recipe.out_dtype))


def _step(
    recipe: Recipe,
    parents: Mapping[str, Parent],
    mix: Mix,
    output: str,
    suffix: str | None,
    vocabulary: Vocabulary | None,
    tables: frozenset[str],
) -> Step:
    """suffix: the name inside a layer, None for a tensor outside the stack."""
    read = [*mix.sources, *([mix.base] if mix.base else [])]
    names = [
        output if suffix is None else parents[model].layer_name(_index(layer), suffix)
        for model, layer in read
    ]
    names = [_present(parents[model], model, name) for (model, _), name in zip(read, names, strict=True)]
    infos = [parents[model].tensors[name] for (model, _), name in zip(read, names, strict=True)]
    resized = vocabulary is not None and output in tables
    for (model, _), info in zip(read, infos, strict=True):
        if info.shape[resized:] != infos[-1].shape[resized:]:
            advice = (
                "the architectures differ"
                if suffix
                else "the vocabularies differ; set tokenizer_source: union"
            )
            raise CheckpointError(
                f"'{output}' is {list(info.shape)} in '{model}' and {list(infos[-1].shape)} in '{read[-1][0]}'; {advice}"
            )
    shape = (vocabulary.size, *infos[-1].shape[1:]) if resized and vocabulary is not None else infos[-1].shape
    info = replace(_header(infos[-1], recipe.out_dtype), shape=shape)
    sources = len(mix.sources)
    return Step(output, info, mix, tuple(names[:sources]), names[sources] if mix.base else None)


def _present(parent: Parent, model: str, name: str) -> str:
    """The tensor's name in a parent; a head tied to the embeddings is the embeddings."""
    if name in parent.tensors:
        return name
    text = parent.config.get("text_config", parent.config)
    if (
        parent.place(name).part == "head"
        and name.endswith(".weight")
        and text.get("tie_word_embeddings", parent.config.get("tie_word_embeddings", True))
    ):
        tables = vocabulary_tensors(parent)
        if tables and "norm" not in name:
            return tables[0]
    raise CheckpointError(f"model '{model}' lacks the tensor '{name}'; the architectures differ")


def _header(info: TensorInfo, out_dtype: str) -> TensorInfo:
    floating = info.dtype in ("F64", "F32", "F16", "BF16")
    return TensorInfo(info.shape, DTYPE_CODES[out_dtype] if floating else info.dtype, "")


def _vocabulary(recipe: Recipe, parents: Mapping[str, Parent]) -> Vocabulary | None:
    if recipe.tokenizer is None:
        return None
    return Vocabulary(recipe.tokenizer, recipe.base, {name: parents[name] for name in recipe.reads})


def _values(rule: Method, mix: Mix, output: str, inputs: Sequence[str]) -> Values:
    """Numbers for one tensor: filters see the output name for merge parameters, the model's own for model parameters."""
    given = dict(mix.params)
    values: dict[str, float | tuple[float, ...]] = {}
    for param in rule.params:
        value = given.get(param.name, param.default)
        if param.per == "merge":
            assert not isinstance(value, tuple)
            values[param.name] = _at(value, output, param.default)
        else:
            settings = value if isinstance(value, tuple) else (value,) * len(inputs)
            values[param.name] = tuple(
                _at(s, name, param.default) for s, name in zip(settings, inputs, strict=True)
            )
    return values


def _at(value: Setting, tensor: str, default: float) -> float:
    if isinstance(value, Filtered):
        found = value.at(tensor)
        return default if found is None else found
    return value


def _index(layer: int | None) -> int:
    if layer is None:
        raise RecipeError("a source of an output layer must name a layer")
    return layer
