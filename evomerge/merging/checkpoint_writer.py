"""A merge written to disk as a Hugging Face folder: streamed tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evomerge.checkpoints import Parent
from evomerge.errors import CheckpointError, SetupError
from evomerge.merging.atomic_folder import check_new, new_folder
from evomerge.merging.companion_files import write_companion_files
from evomerge.merging.merge import Merge
from evomerge.merging.older_config_keys import with_older_keys
from evomerge.merging.tensor_plan import Step
from evomerge.methods import method
from evomerge.recipes import Recipe

SHARD_BYTES = 5_000_000_000
"""Bytes after which a new weight file begins."""
Progress = Callable[[int, int], None]
"""Called with the number of tensors done and their total."""


def write(
    recipe: Recipe,
    parents: Mapping[str, Parent],
    directory: Path,
    progress: Progress | None = None,
    memory: int | None = None,
) -> None:
    """Merges a recipe to a new folder with safetensors, config and tokenizer; it appears whole or not at all.

    Args:
        recipe: The recipe.
        parents: Name -> parent, for every model that the recipe reads.
        directory: Folder to create.
        progress: Called after every tensor.
        memory: Bytes that merging may hold besides the parents' mapped files, None for any number.

    Raises:
        SetupError: Before a tensor is read, if the directory exists, the disk is too full or a tensor needs
            more memory.
        RecipeError: No method accepts the recipe.
        CheckpointError: The parents do not fit together.
        CandidateError: A value of the result is not finite.
    """
    check_new(directory)
    merge = Merge(recipe, parents)
    with new_folder(directory) as staging:
        write_into(merge, staging, progress, memory)


def write_into(
    merge: Merge,
    directory: Path,
    progress: Progress | None = None,
    memory: int | None = None,
    shard: int = SHARD_BYTES,
) -> None:
    """Like `write`, into a folder that exists; whoever calls it makes it whole.

    Args:
        merge: The merge.
        directory: The folder.
        progress: Called after every tensor.
        memory: Bytes that merging may hold besides the parents' mapped files, None for any number.
        shard: Bytes after which a new weight file begins.

    Raises:
        SetupError: Before a tensor is read, if the disk is too full or a tensor needs more memory.
        CandidateError: A value of the result is not finite.
    """
    needed = sum(step.info.nbytes for step in merge.steps)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SetupError(
            f"the merged model takes {needed / 1e9:.1f} GB, {directory.parent} has {free / 1e9:.1f} GB free; "
            "make room or choose another disk"
        )
    if memory is not None:
        most, name = max((peak_bytes(merge, step), step.name) for step in merge.steps)
        if most > memory:
            raise SetupError(
                f"tensor '{name}' takes {most / 1e6:,.0f} MB to merge, more than the {memory / 1e6:,.0f} MB "
                "allowed; raise --memory"
            )
    _save(merge, directory, progress, shard)
    config = with_older_keys(merge.config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_companion_files(merge, directory)


def peak_bytes(merge: Merge, step: Step) -> int:
    """Estimates the memory that merging one tensor takes at most.

    Args:
        merge: The merge.
        step: One of its steps.

    Returns:
        Bytes of the result, of the one before it that is being written, and of copies of the inputs.
    """
    elements = math.prod(step.info.shape)
    if step.mix is None:
        return step.info.nbytes
    rule = method(step.mix.method)
    intermediate = {name for name, _ in merge.recipe.stages}
    merged_inputs = sum(4 * elements for model in step.mix.models if model in intermediate)
    results = 2 * step.info.nbytes + merged_inputs
    if merge.recipe.policy == "float32" and rule.task_vector_sum is not None:  # one pass over the inputs
        sparsifier = rule.task_vector_sum.sparsifier
        per_element = sparsifier.bytes_per_element if sparsifier is not None else 0
        return results + per_element * elements * len(step.inputs)
    if merge.recipe.policy == "float32" and merge.combines(step):
        return results
    inputs = len(step.inputs) + (step.base is not None)
    return results + 4 * elements * (inputs + 3)


def _save(merge: Merge, directory: Path, progress: Progress | None, shard: int) -> None:
    """model.safetensors, or its shards and their index. One tensor is written while the next is merged."""
    shards = _shards(merge.steps, shard)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    done = 0
    written: Future[None] | None = None
    with ThreadPoolExecutor(1) as pool:
        for name, steps in zip(names, shards, strict=True):
            with (directory / name).open("wb") as file:
                file.write(_header(steps))
                for step in steps:
                    tensor = merge.tensor(step)
                    if written is not None:
                        written.result()
                    written = pool.submit(_append, file, tensor, step)
                    done += 1
                    if progress:
                        progress(done, len(merge.steps))
                if written is not None:
                    written.result()
    if len(shards) > 1:
        weight_map = {step.name: name for name, steps in zip(names, shards, strict=True) for step in steps}
        total = sum(step.info.nbytes for step in merge.steps)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(steps: Sequence[Step], size: int) -> list[list[Step]]:
    shards: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        if shards[-1] and filled + step.info.nbytes > size:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += step.info.nbytes
    return shards


def _header(steps: Sequence[Step]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON filled up with spaces to a multiple of 8."""
    ends = [0]
    for step in steps:
        ends.append(ends[-1] + step.info.nbytes)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for step, (start, end) in zip(steps, pairwise(ends), strict=True):
        entries[step.name] = {
            "dtype": step.info.dtype,
            "shape": list(step.info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _append(file: BinaryIO, tensor: Tensor, step: Step) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes != step.info.nbytes:
        raise CheckpointError(
            f"'{step.name}' came out with {data.nbytes} bytes, planned were {step.info.nbytes}"
        )
    file.write(data.data)
