"""Parents' folders -> transformers models and tokenizers in memory."""

from __future__ import annotations

import logging

import torch
from torch import nn

from evomerge.checkpoints import Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.errors import SetupError
from evomerge.merging.weight_map import WeightMap


def load(checkpoint: Parent, dtype: str) -> nn.Module:
    """The checkpoint as a live transformers model in evaluation mode. Never runs code from the checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    refusal = ""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            model = kind.from_pretrained(
                checkpoint.path,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            refusal = refusal or str(error).splitlines()[0]
            continue
        module: nn.Module = model.eval()
        return module.requires_grad_(False)
    raise SetupError(f"transformers cannot load {checkpoint.path}: {refusal}")


def load_parent(parent: Parent, dtype: str) -> nn.Module:
    """A parent as a live model, its adapter folded in where it has one."""
    model = load(parent, dtype)
    if isinstance(parent, AdaptedCheckpoint):
        resident = WeightMap(model, parent.tensors)
        for name in parent.tensors:
            if name not in resident.ignored:
                resident.put(name, parent.tensor(name).to(getattr(torch, dtype)))
    return model


log = logging.getLogger(__name__)


def load_tokenizer(checkpoint: Parent) -> object:
    """The checkpoint's tokenizer."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint.path, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(
            f"transformers cannot load the tokenizer of {checkpoint.path}: {str(error).splitlines()[0]}"
        ) from None
