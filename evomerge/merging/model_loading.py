"""Folders of models -> transformers models and tokenizers in memory. Never runs code from a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints import Parent, safetensors_headers
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.checkpoints.tokenizer_checks import check_tokenizer, missing_library
from evomerge.errors import CheckpointError, SetupError
from evomerge.merging import bfloat16_products
from evomerge.merging.weight_map import WeightMap

_MOST_TIMES, _ROOM = 4, 2**26  # a model may have so many times its weights' numbers, and so many more


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A folder as transformers loads it.

    Attributes:
        model: The model, in evaluation mode and without gradients.
        missing: Names of the tensors that the model has and the folder does not; they are left at random.
        surplus: Names of the tensors that the folder alone has.
        misshapen: Names of the tensors whose shapes differ; they are left at random.
    """

    model: nn.Module
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """A phrase for each tensor that is not the model's own."""
        return (
            *(f"{name} is missing" for name in self.missing),
            *(f"{name} is one too many" for name in self.surplus),
            *(f"{name} has another shape" for name in self.misshapen),
        )


def load_model(path: Path, dtype: str, attention: str | None = None) -> LoadedModel:
    """Loads a Hugging Face folder with transformers.

    Args:
        path: The folder.
        dtype: torch's name of the type that the model computes in.
        attention: transformers' name of the attention implementation, None for the default.

    Returns:
        The model, and which of its tensors are not the folder's.

    Raises:
        CheckpointError: transformers refuses the folder.
    """
    import transformers

    bfloat16_products.install()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    stored = sum(math.prod(tensor.shape) for tensor in safetensors_headers.read_folder(path).values())
    refusal = ""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            _check_size(kind, path, stored)
            model, info = kind.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except CheckpointError:
            raise
        except Exception as error:  # config.json is anybody's, and transformers computes with what it holds
            refusal = refusal or _first_line(error)
            continue
        misshapen = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
        module: nn.Module = model.eval().requires_grad_(False)
        return LoadedModel(
            module,
            tuple(sorted(info["missing_keys"])),
            tuple(sorted(info["unexpected_keys"])),
            tuple(sorted(misshapen)),
        )
    raise CheckpointError(f"transformers cannot load {path}: {refusal}")


def _check_size(kind: Any, path: Path, stored: int) -> None:
    """Raises CheckpointError for a config of a model far larger than the `stored` numbers of its weights.

    transformers would make up the rest at random, in any amount of memory.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        empty = kind.from_config(config, trust_remote_code=False)
    built = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    if built > _MOST_TIMES * stored + _ROOM:
        raise CheckpointError(
            f"{path / 'config.json'} describes a model of {built:,} numbers, the weights beside it hold "
            f"{stored:,}; fetch the model again"
        )


def load_base(parent: Parent, dtype: str) -> nn.Module:
    """Loads the folder of a parent, without its adapter if it has one.

    Args:
        parent: The parent.
        dtype: torch's name of the type that the model computes in.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        CheckpointError: transformers refuses the folder, or a tensor has another shape than the model's.
    """
    loaded = load_model(parent.path, dtype)
    if loaded.misshapen:
        raise CheckpointError(
            f"transformers cannot load {parent.path}: {loaded.misshapen[0]} has another shape than "
            "config.json says"
        )
    return loaded.model


def load_parent(parent: Parent, dtype: str) -> nn.Module:
    """Loads a parent, its adapter folded in if it has one.

    Args:
        parent: The parent, as it is on disk.
        dtype: torch's name of the type that the model computes in.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        CheckpointError: transformers refuses the folder.
    """
    model = load_base(parent, dtype)
    if isinstance(parent, AdaptedCheckpoint):
        weights = WeightMap(model, parent.tensors)
        for name in parent.tensors:
            if name not in weights.ignored:
                weights.put(name, parent.tensor(name).to(getattr(torch, dtype)))
    return model


def load_tokenizer(parent: Parent) -> object:
    """Loads the tokenizer of a parent with transformers.

    Args:
        parent: The parent.

    Returns:
        The tokenizer.

    Raises:
        SetupError: transformers refuses it, or it could grow a text beyond all bounds.
    """
    import transformers

    check_tokenizer(parent.path)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            parent.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        if library := missing_library(parent.path):
            raise SetupError(f"the tokenizer of {parent.path} cannot be read: {library}") from None
        raise SetupError(
            f"the tokenizer of {parent.path} is broken or of a kind that transformers cannot load: "
            f"{_first_line(error)}; fetch its files again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
