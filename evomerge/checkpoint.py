"""Parent models on disk: safetensors, memory-mapped, and what each tensor's name says. Knows nothing of recipes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.errors import CheckpointError

Part = Literal["embeddings", "layer", "head"]
COMPONENTS = ("attention", "mlp", "other")
_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "experts", "block_sparse_moe")
_EMBEDDINGS = ("embed", "wte", "wpe", "emb.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. layer: index in the decoder stack, None outside it; suffix: name after 'stack.N.'."""

    part: Part
    layer: int | None
    component: str
    suffix: str


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Header facts of one tensor. dtype: safetensors' name, such as 'BF16'; file: the shard that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class Checkpoint:
    """An open model folder. Tensors are views of memory-mapped files: read them, never write to them."""

    def __init__(self, path: Path) -> None:
        """Reads config and headers only. Raises CheckpointError naming the file that is missing or broken."""
        self.path = path
        self.config: dict[str, Any] = _json(path / "config.json", "a Hugging Face model folder has one")
        self._files = {file.name: _open(file) for file in _shards(path)}
        self.tensors: dict[str, TensorInfo] = {}
        for file, handle in self._files.items():
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                view = handle.get_slice(name)
                self.tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype(), file)
        if not self.tensors:
            raise CheckpointError(f"{path} holds no tensors")
        text = self.config.get("text_config", self.config)
        self.num_layers = int(text.get("num_hidden_layers", text.get("n_layer", 0)))
        self.stack = _stack(self.tensors, self.num_layers, path)

    @property
    def dtype(self) -> str:
        """The type of most of its tensors, in torch's name; 'float32' where that is none of the usual three."""
        kinds = [info.dtype for info in self.tensors.values()]
        return {"BF16": "bfloat16", "F16": "float16"}.get(max(kinds, key=kinds.count), "float32")

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, memory-mapped where its file is aligned for it."""
        try:
            handle = self._files[self.tensors[name].file]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor '{name}'") from None
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def place(self, name: str) -> Place:
        """Part, layer and component that a tensor's name says."""
        if name.startswith(self.stack + "."):
            index, _, suffix = name[len(self.stack) + 1 :].partition(".")
            if index.isdigit():
                return Place("layer", int(index), _component(suffix), suffix)
        part: Part = "embeddings" if any(word in name for word in _EMBEDDINGS) else "head"
        return Place(part, None, "other", name)

    def layer_name(self, layer: int, suffix: str) -> str:
        """Full name of a layer's tensor."""
        return f"{self.stack}.{layer}.{suffix}"

    def layer_suffixes(self, layer: int) -> tuple[str, ...]:
        """Names after 'stack.N.' of one layer's tensors, sorted."""
        prefix = f"{self.stack}.{layer}."
        found = tuple(sorted(name[len(prefix) :] for name in self.tensors if name.startswith(prefix)))
        if not found:
            raise CheckpointError(f"{self.path} has no layer {layer}; its layers are 0 to {self.num_layers - 1}")
        return found

    def outer_names(self, part: Part) -> tuple[str, ...]:
        """Names of the tensors before ('embeddings') or after ('head') the stack, sorted."""
        return tuple(sorted(name for name in self.tensors if self.place(name).part == part))

    def content_hash(self) -> str:
        """SHA-256 over config and tensor files: what a study remembers a parent by. Reads every byte once."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._files):
            with (self.path / file).open("rb") as stream:
                digest.update(file.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def equal_tensors(self, other: Checkpoint) -> Iterator[str]:
        """Names of the tensors that are the same, bit for bit, in both checkpoints."""
        for name, info in self.tensors.items():
            twin = other.tensors.get(name)
            if twin and (twin.shape, twin.dtype) == (info.shape, info.dtype) and torch.equal(self.tensor(name), other.tensor(name)):
                yield name


def locate(reference: str, revision: str | None = None) -> Path:
    """Folder of a model: a local path as it is, else a Hugging Face repository, downloaded or from the cache."""
    try:
        path = Path(reference).expanduser()
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"'{reference[:80]}' cannot be a folder: {error}") from None
    if path.is_absolute() or reference.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        raise CheckpointError(f"there is no folder '{reference}' (looked from {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{reference}' is neither a folder here (looked from {Path.cwd()}) nor a model that could be fetched: {reason}"
        ) from None


def check_compatible(parents: Mapping[str, Checkpoint], base: str) -> None:
    """Raises CheckpointError unless every parent has the base's tensors in the base's shapes, layer for layer."""
    expected = parents[base]
    for name, parent in parents.items():
        for tensor, info in expected.tensors.items():
            found = parent.tensors.get(tensor)
            if found is None:
                raise CheckpointError(f"model '{name}' lacks the tensor '{tensor}' of base '{base}'; the architectures differ")
            if found.shape != info.shape:
                place = expected.place(tensor)
                advice = "the vocabularies differ" if place.layer is None else "the architectures differ"
                raise CheckpointError(f"'{tensor}' is {list(found.shape)} in model '{name}' and {list(info.shape)} in base '{base}'; {advice}")


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index, "an index")["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        kinds = sorted(file.name for file in path.glob("*.bin"))
        hint = f"; convert {kinds[0]} with save_pretrained(safe_serialization=True)" if kinds else ""
        raise CheckpointError(f"{path} has no .safetensors file{hint}")
    return files


def _open(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing or not a regular file")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None


def _json(file: Path, why: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {why}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


def _stack(names: Mapping[str, TensorInfo], depth: int, path: Path) -> str:
    """Prefix of the decoder stack: of the numbered families with exactly `depth` members, the one with most tensors."""
    families: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            prefix = name[: match.start()]
            families.setdefault(prefix, set()).add(int(match[1]))
            count[prefix] = count.get(prefix, 0) + 1
    fitting = sorted((p for p, seen in families.items() if seen == set(range(depth))), key=lambda p: (-count[p], len(p), p))
    if not fitting:
        raise CheckpointError(f"{path}: no stack of {depth} layers found among the tensor names (config says num_hidden_layers={depth})")
    return fitting[0]


def _component(suffix: str) -> str:
    head = suffix.split(".", 1)[0]
    if "norm" in head:  # input_layernorm, post_attention_layernorm
        return "other"
    if any(word in suffix for word in _ATTENTION):
        return "attention"
    return "mlp" if any(word in suffix for word in _MLP) else "other"
