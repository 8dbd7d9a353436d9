"""A merge written to disk as a Hugging Face folder: streamed tensor by tensor, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evomerge import chat_templates
from evomerge.checkpoint import Parent
from evomerge.errors import CheckpointError, SetupError
from evomerge.headers import json_object
from evomerge.merge import Merge, Step
from evomerge.methods import method
from evomerge.recipe import Recipe

SHARD = 5_000_000_000  # bytes
Progress = Callable[[int, int], None]
"""Called with the number of tensors done and their total."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "added_tokens.json", "*.jinja", "chat_template.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write(recipe: Recipe, parents: Mapping[str, Parent], directory: Path, progress: Progress | None = None, memory: int | None = None) -> None:
    """Writes safetensors, config and tokenizer beside `directory` and renames the folder into place.

    memory: bytes that merging may hold besides the parents' mapped files. Raises SetupError, before a tensor is read, if
    the directory exists, the disk is too full or a tensor needs more than that.
    """
    check_new(directory)
    merge = Merge(recipe, parents)
    with whole(directory) as staging:
        write_into(merge, staging, progress, memory)


def check_new(directory: Path) -> None:
    """Raises SetupError if the directory exists."""
    if directory.exists():
        raise SetupError(f"{directory} exists; choose another folder or remove it")


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A folder to fill beside `directory`, renamed to it at the end; whatever is raised, nothing is left."""
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        staging.chmod(0o755)
        yield staging
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_into(merge: Merge, directory: Path, progress: Progress | None = None, memory: int | None = None, shard: int = SHARD) -> None:
    """Like `write`, into a directory that exists; the caller makes it whole. shard: bytes after which a new file begins."""
    needed = sum(step.info.nbytes for step in merge.steps)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise SetupError(
            f"the merged model takes {needed / 1e9:.1f} GB, {directory.parent} has {free / 1e9:.1f} GB free; make room or choose another disk"
        )
    if memory is not None:
        most, name = max((need(merge, step), step.name) for step in merge.steps)
        if most > memory:
            what = f"tensor '{name}' takes {most / 1e6:,.0f} MB to merge"
            raise SetupError(f"{what}, more than the {memory / 1e6:,.0f} MB allowed; raise --memory")
    _save(merge, directory, progress, shard)
    (directory / "config.json").write_text(json.dumps(merge.config, indent=2) + "\n")
    _companions(merge, directory)


def need(merge: Merge, step: Step) -> int:
    """Bytes that merging one tensor takes at most, by estimate: the result, the one before it that is being written, and copies of the inputs."""
    elements = math.prod(step.info.shape)
    if step.mix is None:
        return step.info.nbytes
    inputs, rule = len(step.inputs) + (step.base is not None), method(step.mix.method)
    stages = {name for name, _ in merge.recipe.stages}
    staged = sum(4 * elements for model in step.mix.models if model in stages)
    if merge.recipe.policy == "float32" and rule.frame is not None:  # one pass; DELLA holds the ranks of every element
        return 2 * step.info.nbytes + staged + (2 * elements * len(step.inputs) if rule.frame.sparsify == "rank" else 0)
    if merge.recipe.policy == "float32" and merge.combines(step):
        return 2 * step.info.nbytes + staged
    return 2 * step.info.nbytes + staged + 4 * elements * (inputs + 3)


def _save(merge: Merge, directory: Path, progress: Progress | None, shard: int) -> None:
    """model.safetensors, or its shards and their index. One tensor is written while the next is merged."""
    shards = _shards(merge.steps, shard)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors" for i in range(1, len(shards) + 1)]
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
        index = {
            "metadata": {"total_size": sum(step.info.nbytes for step in merge.steps)},
            "weight_map": {step.name: name for name, steps in zip(names, shards, strict=True) for step in steps},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(steps: Sequence[Step], size: int) -> list[list[Step]]:
    shards: list[list[Step]] = [[]]
    held = 0
    for step in steps:
        if shards[-1] and held + step.info.nbytes > size:
            shards.append([])
            held = 0
        shards[-1].append(step)
        held += step.info.nbytes
    return shards


def _header(steps: Sequence[Step]) -> bytes:
    """A safetensors header: its length in eight bytes, then JSON filled up with spaces to a multiple of eight."""
    ends = [0]
    for step in steps:
        ends.append(ends[-1] + step.info.nbytes)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for step, (start, end) in zip(steps, pairwise(ends), strict=True):
        entries[step.name] = {"dtype": step.info.dtype, "shape": list(step.info.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _append(file: BinaryIO, tensor: Tensor, step: Step) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if data.nbytes != step.info.nbytes:
        raise CheckpointError(f"'{step.name}' came out with {data.nbytes} bytes, planned were {step.info.nbytes}")
    file.write(data.data)


def _companions(merge: Merge, directory: Path) -> None:
    """Tokenizer, generation config and chat template."""
    donor = merge.parents[merge.recipe.base]
    patterns = PROCESSORS if merge.vocabulary else (*TOKENIZER, *PROCESSORS)
    for pattern in patterns:
        for file in sorted(donor.path.glob(pattern)):
            shutil.copyfile(file, directory / file.name)
    generation = donor.path / "generation_config.json"
    if generation.is_file() and merge.vocabulary:
        config = merge.vocabulary.config(json_object(generation, ""))
        (directory / generation.name).write_text(json.dumps(config, indent=2) + "\n")
    elif generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    if merge.vocabulary:
        merge.vocabulary.save(directory)
    if merge.recipe.chat_template is not None:
        _template(merge, directory)


def _template(merge: Merge, directory: Path) -> None:
    wish = merge.recipe.chat_template
    assert wish is not None
    own = [found for model in merge.recipe.models if (found := _own_template(merge.parents[model].path)) is not None]
    text = chat_templates.text(wish, own)
    if text is None:
        return
    config = directory / "tokenizer_config.json"
    if config.is_file():
        data = json_object(config, "")
        data.pop("chat_template", None)
        config.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    (directory / "chat_template.json").unlink(missing_ok=True)
    (directory / "chat_template.jinja").write_text(text)


def _own_template(path: Path) -> str | None:
    """A model's chat template: a file of its own, or an entry of the tokenizer's config."""
    file, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json_object(config, "").get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
