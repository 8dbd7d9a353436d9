"""A model folder on disk: safetensors files, memory-mapped, and the layout of their tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.checkpoints import config_checks, safetensors_headers
from evomerge.checkpoints.layout import Layout, layout_of, suffixes_by_layer
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.checkpoints.tensor_names import find_towers, is_buffer
from evomerge.errors import CheckpointError

_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MOST_COMPANION = 250_000_000  # bytes


class Checkpoint:
    """An open model folder. Tensors are views of memory-mapped files: read them, never write to them.

        checkpoint = Checkpoint(Path("models/math"))
        print(checkpoint.layout.num_layers, len(checkpoint.tensors))

    Attributes:
        path: The folder.
        config: Its config.json.
        tensors: Tensor name -> shape, type and file, from the headers; without tables that models compute
            themselves, such as rotary frequencies.
        layout: The tensor names, divided into parts and layers.
        files: The weight files, sorted.
    """

    def __init__(self, path: Path) -> None:
        """Opens a folder; reads its config and the headers of its weight files, no weights.

        Args:
            path: A Hugging Face model folder with safetensors files.

        Raises:
            CheckpointError: A file is missing or broken, or the model is quantised; names the file.
        """
        self.path = path
        self.config: dict[str, Any] = safetensors_headers.read_json_object(
            path / "config.json", _advice_without_config(path)
        )
        text = _text_config(self.config, path)
        config_checks.check_references(self.config, path / "config.json")
        _check_no_adapter(path)
        _check_companions(path)
        self.tensors: dict[str, TensorInfo] = {
            name: info
            for name, info in safetensors_headers.read_folder(path).items()
            if not is_buffer(name, info.shape)
        }
        if not self.tensors:
            raise CheckpointError(f"{path} holds no tensors; fetch the model again")
        self.layout: Layout = _layout(path, self.tensors, self.config, text)
        longest = max((side for info in self.tensors.values() for side in info.shape), default=1)
        config_checks.check_numbers(self.config, path / "config.json", len(self.tensors), longest)
        self._handles = {
            file: _open(path / file) for file in sorted({info.file for info in self.tensors.values()})
        }
        self.files = tuple(path / file for file in self._handles)

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor, memory-mapped where the file is aligned for it.
        """
        try:
            handle = self._handles[self.tensors[name].file]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor '{name}'") from None
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def content_hash(self) -> str:
        """See `Parent.content_hash`; over config and weight files, reads every byte once."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._handles):
            with (self.path / file).open("rb") as stream:
                digest.update(file.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def file_stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Facts of files that change when somebody writes to them while they are mapped.

    Args:
        files: The files.

    Returns:
        File -> (size in bytes, time of change in ns, inode); zeros for a file that is gone.
    """
    stamps = {}
    for file in files:
        try:
            status = file.stat()
            stamps[file] = (status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError:
            stamps[file] = (0, 0, 0)
    return stamps


def _layout(
    path: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], text: Mapping[str, Any]
) -> Layout:
    """The layout of a folder's tensors. Raises CheckpointError unless its depth is the config's."""
    depth = _depth(text, len(tensors), path)
    broken = CheckpointError(
        f"{path}: no stack of {depth} layers, as config.json says, among the tensor names; fetch the model "
        "again"
    )
    language = find_towers({name: info.shape for name, info in tensors.items()}, config)
    if language is None:
        raise broken
    towers = set(language.others)
    layers = suffixes_by_layer(tensors, language.stack, towers)
    num_layers = len(layers) if depth is None else depth
    further = [layer for layer in layers if layer >= num_layers]
    # layers that predict further tokens follow the decoder's; transformers leaves them out
    if further and len(further) == text.get("num_nextn_predict_layers"):
        for layer in further:
            towers |= {f"{language.stack}.{layer}.{suffix}" for suffix in layers.pop(layer)}
    if set(layers) != set(range(num_layers)):
        raise broken
    return layout_of(tensors, language.stack, num_layers, towers, str(path))


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({reason}); fetch or save it again"
        ) from None


def _advice_without_config(path: Path) -> str:
    """What to do about a folder without config.json."""
    if (path / "adapter_config.json").exists():
        return f"{path.name} is a LoRA adapter: name it with its base, as base+{path.name}"
    if (path / "snapshots").is_dir():
        snapshots = sorted((path / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime)
        if snapshots:
            return f"{path} is a repository in the Hub's cache, give {snapshots[-1]}"
    if path.is_dir():
        return "give a Hugging Face model folder, which has one"
    return "there is no such folder; give that of a model"


def _check_no_adapter(path: Path) -> None:
    """Raises CheckpointError for a model with an adapter beside it, which transformers would fold in."""
    if os.path.lexists(path / "adapter_config.json"):
        raise CheckpointError(
            f"{path} is a model and has an adapter_config.json beside it, which transformers applies where "
            "peft is installed; move the adapter to a folder of its own and name it base+adapter"
        )


def _check_companions(path: Path) -> None:
    """Raises CheckpointError for a file beside the weights that libraries read, or an export copies, whole.

    It has to be a regular file of the folder: a device has no end, and a link would take in any file.
    """
    for file in sorted(path.iterdir()):
        if file.name.startswith("tokenizer") or file.suffix in _COMPANIONS:
            safetensors_headers.check_file(file)
            size = file.stat().st_size
            if size > _MOST_COMPANION:
                raise CheckpointError(
                    f"{file} has {size:,} bytes, at most {_MOST_COMPANION:,} are read; fetch the model again"
                )


def _text_config(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The language model's part of a config. Raises CheckpointError for a quantised model."""
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{path / 'config.json'}: text_config must be an object, got {type(text).__name__}"
        )
    if any(part.get(key) for part in (config, text) for key in ("quantization_config", "compression_config")):
        raise CheckpointError(
            f"{path / 'config.json'} has a quantization_config: quantised weights cannot be merged; "
            "dequantise the model first"
        )
    return text


def _depth(text: Mapping[str, Any], tensors: int, path: Path) -> int | None:
    """Number of decoder layers that a config names, None if it names none. Each has at least one tensor."""
    key = next((key for key in ("num_hidden_layers", "n_layer") if key in text), None)
    if key is None:
        return None
    depth = text[key]
    if type(depth) is not int or not 0 < depth <= tensors:
        raise CheckpointError(
            f"{path / 'config.json'}: {key} must be a whole number from 1 to {tensors}, the number of "
            f"tensors, got {depth!r:.80}"
        )
    return depth
