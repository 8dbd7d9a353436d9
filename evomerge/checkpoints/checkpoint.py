"""Parent models on disk: safetensors, memory-mapped, and what each tensor's name says. Knows nothing of recipes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.checkpoints import safetensors_headers
from evomerge.checkpoints.parent import Parent, Part, Place, equal
from evomerge.checkpoints.safetensors_headers import TensorInfo as TensorInfo
from evomerge.checkpoints.tensor_names import towers
from evomerge.errors import CheckpointError

_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "experts", "block_sparse_moe")
_EMBEDDINGS = ("embed", "wte", "wpe", "emb.")


class Checkpoint:
    """An open model folder. Tensors are views of memory-mapped files: read them, never write to them."""

    def __init__(self, path: Path) -> None:
        """Reads config and headers only. Raises CheckpointError naming the file that is missing or broken."""
        self.path = path
        self.config: dict[str, Any] = safetensors_headers.json_object(path / "config.json", _no_config(path))
        text = _text_config(self.config, path)
        self.tensors: dict[str, TensorInfo] = safetensors_headers.tensors(path)
        if not self.tensors:
            raise CheckpointError(f"{path} holds no tensors; fetch the model again")
        depth = _depth(text, len(self.tensors), path)
        found = towers({name: info.shape for name, info in self.tensors.items()}, self.config)
        if found is None:
            raise CheckpointError(
                f"{path}: no stack of {depth} layers, as config.json says, among the tensor names; fetch the model again"
            )
        self.stack = found.stack
        self._towers, self._layers = set(found.others), _layers(self.tensors, found.stack, found.others)
        self.num_layers = len(self._layers) if depth is None else depth
        further = [layer for layer in self._layers if layer >= self.num_layers]
        if further and len(further) == text.get(
            "num_nextn_predict_layers"
        ):  # they predict further tokens; transformers leaves them out
            for layer in further:
                self._towers |= {self.layer_name(layer, suffix) for suffix in self._layers.pop(layer)}
        if set(self._layers) != set(range(self.num_layers)):
            raise CheckpointError(
                f"{path}: no stack of {depth} layers, as config.json says, among the tensor names; fetch the model again"
            )
        outer = [
            (place.part, name) for name in sorted(self.tensors) if (place := self.place(name)).layer is None
        ]
        self._outer = {part: tuple(name for of, name in outer if of == part) for part, _ in outer}
        self._files = {
            file: _open(path / file) for file in sorted({info.file for info in self.tensors.values()})
        }
        self.files = tuple(path / file for file in self._files)

    @property
    def dtype(self) -> str:
        """The type of most of its tensors, in torch's name; 'float32' where that is none of the usual three."""
        kinds = Counter(info.dtype for info in self.tensors.values())
        return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.most_common(1)[0][0], "float32")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor, as it is stored."""
        return max(info.nbytes for info in self.tensors.values())

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
        if name in self._towers:
            return Place("tower", None, "other", name)
        if found := _layer(name, self.stack):
            return Place("layer", found[0], _component(found[1]), found[1])
        part: Part = "embeddings" if any(word in name for word in _EMBEDDINGS) else "head"
        return Place(part, None, "other", name)

    def layer_name(self, layer: int, suffix: str) -> str:
        """Full name of a layer's tensor."""
        return f"{self.stack}.{layer}.{suffix}"

    def layer_suffixes(self, layer: int) -> tuple[str, ...]:
        """Names after 'stack.N.' of one layer's tensors, sorted."""
        found = self._layers.get(layer)
        if not found:
            raise CheckpointError(
                f"{self.path} has no layer {layer}; its layers are 0 to {self.num_layers - 1}"
            )
        return found

    def outer_names(self, part: Part) -> tuple[str, ...]:
        """Names of the tensors before ('embeddings') or after ('head') the stack, or of other 'tower's, sorted."""
        return self._outer.get(part, ())

    def content_hash(self) -> str:
        """SHA-256 over config and tensor files: what a study remembers a parent by. Reads every byte once."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._files):
            with (self.path / file).open("rb") as stream:
                digest.update(file.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def equal_tensors(self, other: Parent) -> Iterator[str]:
        """Names of the tensors that are the same, bit for bit, in both."""
        return equal(self, other)


def stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """File -> its size, time of change and inode: what tells that somebody writes to it while it is mapped. 0s: it is gone."""
    found = {}
    for file in files:
        try:
            now = file.stat()
            found[file] = (now.st_size, now.st_mtime_ns, now.st_ino)
        except OSError:
            found[file] = (0, 0, 0)
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({' '.join(str(error).split())}); fetch or save it again"
        ) from None


def _no_config(path: Path) -> str:
    """What to do about a folder without config.json."""
    if (path / "adapter_config.json").exists():
        return f"{path.name} is a LoRA adapter: name it with its base, as base+{path.name}"
    return (
        "give a Hugging Face model folder, which has one"
        if path.is_dir()
        else "there is no such folder; give that of a model"
    )


def _text_config(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The part of a config that describes the language model. Raises CheckpointError for a quantised model."""
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{path / 'config.json'}: text_config must be an object, got {type(text).__name__}"
        )
    if any(part.get(key) for part in (config, text) for key in ("quantization_config", "compression_config")):
        raise CheckpointError(
            f"{path / 'config.json'} has a quantization_config: quantised weights cannot be merged; dequantise the model first"
        )
    return text


def _depth(text: Mapping[str, Any], tensors: int, path: Path) -> int | None:
    """Number of decoder layers that a config names, None if it names none; a layer has at least one of the folder's tensors."""
    key = next((key for key in ("num_hidden_layers", "n_layer") if key in text), None)
    depth = text[key] if key else None
    if key and (type(depth) is not int or not 0 < depth <= tensors):
        raise CheckpointError(
            f"{path / 'config.json'}: {key} must be a whole number from 1 to {tensors}, the number of tensors, got {depth!r:.80}"
        )
    return depth


def _layer(name: str, stack: str) -> tuple[int, str] | None:
    """(layer, suffix) of a name in the stack."""
    if not name.startswith(stack + "."):
        return None
    index, _, suffix = name[len(stack) + 1 :].partition(".")
    return (int(index), suffix) if index.isascii() and index.isdigit() else None


def _layers(names: Iterable[str], stack: str, others: Collection[str]) -> dict[int, tuple[str, ...]]:
    """Layer -> its suffixes, sorted."""
    layers: dict[int, list[str]] = {}
    for name in names:
        if name not in others and (found := _layer(name, stack)):
            layers.setdefault(found[0], []).append(found[1])
    return {layer: tuple(sorted(suffixes)) for layer, suffixes in layers.items()}


def _component(suffix: str) -> str:
    head = suffix.split(".", 1)[0]
    if "norm" in head:  # input_layernorm, post_attention_layernorm
        return "other"
    if any(word in suffix for word in _ATTENTION):
        return "attention"
    return "mlp" if any(word in suffix for word in _MLP) else "other"
