"""Recipe + parents -> merged tensors: one code path, into a live model, to disk, or as an iterator.

Arithmetic: inputs are upcast to the recipe's dtype, merged there, and rounded once to its out_dtype. What a worker
scores is what `write` ships, bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evomerge.checkpoint import Checkpoint
from evomerge.errors import CandidateError, CheckpointError, RecipeError, SetupError, suggest
from evomerge.methods import Method, Values, method
from evomerge.recipe import Filtered, Mix, ParamValue, Recipe, Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "generation_config.json", "*.jinja", "added_tokens.json")


def check(recipe: Recipe) -> None:
    """Raises RecipeError, naming layer and model, unless every mix is one that its method accepts."""
    for name in (recipe.dtype, recipe.out_dtype):
        if name not in DTYPES:
            raise RecipeError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}")
    for where, mix in zip(_places(recipe), recipe.mixes, strict=True):
        rule = method(mix.method)
        least, most = rule.models
        if not least <= len(mix.sources) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise RecipeError(f"{mix.method} takes {wanted} source models besides the base, got {len(mix.sources)} ({where})")
        if rule.needs_base and mix.base is None:
            raise RecipeError(f"{mix.method} needs a base model ({where})")
        for name, value in mix.params:
            _check_param(rule, name, value, mix, where)


def merged(recipe: Recipe, parents: Mapping[str, Checkpoint]) -> Iterator[tuple[str, Tensor]]:
    """(output tensor name, tensor of out_dtype), one at a time: embeddings, layers in order, head.

    Raises CandidateError if a tensor comes out with a value that is not finite.
    """
    shell = parents[recipe.base]
    for name in shell.outer_names("embeddings"):
        yield _one(recipe, parents, recipe.embeddings, name, None)
    for depth, mix in enumerate(recipe.layers):
        read = [(model, index) for model, index in (*mix.sources, *([mix.base] if mix.base else ()))]
        suffixes = {suffix for model, index in read for suffix in parents[model].layer_suffixes(_index(index))}
        for suffix in sorted(suffixes):
            yield _one(recipe, parents, mix, shell.layer_name(depth, suffix), suffix)
    for name in shell.outer_names("head"):
        yield _one(recipe, parents, recipe.head, name, None)


def into(recipe: Recipe, parents: Mapping[str, Checkpoint], model: nn.Module) -> None:
    """Copies the merged tensors into a live model of the base's architecture; parameter objects stay the same."""
    slots = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    if len(recipe.layers) != parents[recipe.base].num_layers:
        raise CandidateError(
            f"the recipe has {len(recipe.layers)} layers, the resident model {parents[recipe.base].num_layers}; a search keeps the base's depth"
        )
    with torch.no_grad():
        for name, tensor in merged(recipe, parents):
            slot = slots.get(name)
            if slot is None:
                raise CheckpointError(f"the model in memory has no tensor '{name}'; this architecture renames tensors on loading")
            slot.copy_(tensor)


def write(recipe: Recipe, parents: Mapping[str, Checkpoint], directory: Path, progress: Callable[[int], None] | None = None) -> None:
    """Writes a Hugging Face folder (safetensors, config, tokenizer) beside `directory` and renames it into place.

    progress: called with the number of tensors done. Raises SetupError if the directory exists.
    """
    if directory.exists():
        raise SetupError(f"{directory} exists; choose another folder or remove it")
    check(recipe)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        staging.chmod(0o755)
        write_into(recipe, parents, staging, progress)
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_into(recipe: Recipe, parents: Mapping[str, Checkpoint], directory: Path, progress: Callable[[int], None] | None = None) -> None:
    """Like `write`, into a directory that exists; the caller makes it whole."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in merged(recipe, parents):
        tensors[name] = tensor.contiguous()
        if progress:
            progress(len(tensors))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    donor = parents[recipe.base]
    config = copy.deepcopy(donor.config)
    text = config.get("text_config", config)
    text["n_layer" if "n_layer" in text else "num_hidden_layers"] = len(recipe.layers)
    for key, value in text.items():  # one entry a layer, such as layer_types: as the layers that were taken
        if isinstance(value, list) and len(value) == donor.num_layers:
            text[key] = [value[_index(mix.sources[0][1])] for mix in recipe.layers]
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = recipe.out_dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COPIED:
        for file in donor.path.glob(pattern):
            shutil.copyfile(file, directory / file.name)


def mask_key(seed: int, tensor: str, model: str) -> int:
    """Signed 64-bit key of a random mask: a function of recipe seed, output tensor name and parent, nothing else."""
    digest = hashlib.blake2b(f"{seed}\x1f{tensor}\x1f{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _one(recipe: Recipe, parents: Mapping[str, Checkpoint], mix: Mix, output: str, suffix: str | None) -> tuple[str, Tensor]:
    """Merges one tensor. suffix: the name inside a layer, None for a tensor outside the stack."""
    dtype, out_dtype = DTYPES[recipe.dtype], DTYPES[recipe.out_dtype]
    rule = method(mix.method)

    def name_in(model: str, layer: int | None) -> str:
        return output if suffix is None else parents[model].layer_name(_index(layer), suffix)

    inputs = [name_in(model, layer) for model, layer in mix.sources]
    tensors = [parents[model].tensor(name) for (model, _), name in zip(mix.sources, inputs, strict=True)]
    base = parents[mix.base[0]].tensor(name_in(*mix.base)) if mix.base else None
    for (model, _), tensor in zip(mix.sources, tensors, strict=True):
        other = tensors[0] if base is None else base
        if tensor.shape != other.shape:
            whose = mix.base[0] if mix.base else mix.sources[0][0]
            advice = "the architectures differ" if suffix else "the vocabularies differ"
            raise CheckpointError(f"'{output}' is {list(tensor.shape)} in '{model}' and {list(other.shape)} in '{whose}'; {advice}")
    if not tensors[0].is_floating_point():
        return output, base if base is not None else tensors[0]
    values = _values(rule, mix, output, inputs)
    keys = [mask_key(recipe.seed, output, model) for model, _ in mix.sources]
    out = rule.kernel([t.to(dtype) for t in tensors], None if base is None else base.to(dtype), values, keys).to(out_dtype)
    if not bool(torch.isfinite(out).all()):
        raise CandidateError(f"merging gave a value that is not finite in tensor '{output}' ({mix.method} of {', '.join(mix.models)})")
    return output, out


def _values(rule: Method, mix: Mix, output: str, inputs: list[str]) -> Values:
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
            values[param.name] = tuple(_at(s, name, param.default) for s, name in zip(settings, inputs, strict=True))
    return values


def _at(value: Setting, tensor: str, default: float) -> float:
    if isinstance(value, Filtered):
        found = value.at(tensor)
        return default if found is None else found
    return value


def _check_param(rule: Method, name: str, value: ParamValue, mix: Mix, where: str) -> None:
    param = rule.param(name)
    if param is None:
        raise RecipeError(f"{rule.name} has no parameter '{name}' ({where}). {suggest(name, [p.name for p in rule.params])}")
    if isinstance(value, tuple) and param.per == "merge":
        raise RecipeError(f"{name} of {rule.name} is one value for the merge, not one for each model ({where})")
    settings = value if isinstance(value, tuple) else (value,)
    for i, s in enumerate(settings):
        place = f"{where}, model {mix.sources[i][0]}" if isinstance(value, tuple) else where
        for number in [v for _, v in s.cases] if isinstance(s, Filtered) else [s]:
            param.check(number, place)


def _places(recipe: Recipe) -> list[str]:
    return ["embeddings", *(f"layer {i}" for i in range(len(recipe.layers))), "head"]


def _index(layer: int | None) -> int:
    if layer is None:
        raise RecipeError("a source of an output layer must name a layer")
    return layer
