"""Compares a model with its checkpoint: what both compute on fixed tokens, and the digests of their tensors.

    python -m evomerge.export.reload_check CHECKPOINT INPUTS OUTPUTS

loads a Hugging Face folder with transformers alone, in a process that knows nothing of how it was made, runs
it on the file INPUTS and writes OUTPUTS, with a digest of every tensor. Both are safetensors files.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evomerge.errors import CheckpointError
from evomerge.merging.model_loading import load_model

ROWS, LENGTH, NEW = 3, 12, 16  # token rows, tokens in a row, tokens generated


def check_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Fixed token rows for a model, the second one padded on the left.

    Tokens stay clear of the ids that the config gives a meaning, such as an image's place.

    Args:
        model: A language model of transformers.

    Returns:
        'ids' and 'mask' [ROWS, LENGTH]; 'banned' [N], ids that must not be generated.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    banned = sorted(_named_ids(config.to_dict()) & set(range(text.vocab_size)))
    words = torch.tensor(sorted(set(range(min(text.vocab_size, 1 << 16))) - set(banned)))
    drawn = torch.randint(len(words), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, : LENGTH // 3] = 0
    return {"ids": words[drawn], "mask": mask, "banned": torch.tensor(banned, dtype=torch.long)}


def check_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model computes on fixed token rows.

    Args:
        model: A language model of transformers.
        inputs: As `check_inputs` gives them.

    Returns:
        'logits' [tokens that are not padding, V]; 'steps' [ROWS, NEW, V] and 'tokens' [ROWS, NEW] of a greedy
        generation with the model's cache; on the CPU, in the model's type.
    """
    from transformers import GenerationConfig

    live: Any = model
    device = next(model.parameters()).device
    ids, mask = inputs["ids"].to(device), inputs["mask"].to(device)
    greedy = GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        suppress_tokens=inputs["banned"].tolist() or None,
    )
    before = live.generation_config
    live.generation_config = GenerationConfig()  # settings of the model's own would change the tokens
    try:
        with torch.no_grad():
            logits = live(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            generated = live.generate(ids, attention_mask=mask, generation_config=greedy)
    finally:
        live.generation_config = before
    outputs = {
        "logits": logits,
        "steps": torch.stack(generated.logits, 1),
        "tokens": generated.sequences[:, ids.shape[1] :],
    }
    return {name: tensor.cpu().contiguous() for name, tensor in outputs.items()}


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of type, shape and bits of every parameter and saved buffer.

    Args:
        model: Any module.

    Returns:
        Name in the model -> hexadecimal digest.
    """
    digests = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def main(arguments: Sequence[str]) -> None:
    """The program that the docstring of this file describes.

    Args:
        arguments: CHECKPOINT, INPUTS, OUTPUTS. The metadata of INPUTS: dtype, device, attention, threads.

    Raises:
        CheckpointError: If transformers cannot load the folder, or its tensors are not the model's.
    """
    folder, inputs, outputs = arguments
    with safe_open(inputs, framework="pt") as file:
        settings = file.metadata()
    torch.set_num_threads(int(settings["threads"]))
    loaded = load_model(Path(folder), settings["dtype"], settings["attention"])
    if loaded.faults:
        shown = "; ".join(loaded.faults[:3])
        raise CheckpointError(f"{len(loaded.faults)} tensors of {folder} are not the model's: {shown}")
    model = loaded.model.to(settings["device"])
    save_file(check_outputs(model, load_file(inputs)), outputs, metadata=tensor_digests(loaded.model))


def _named_ids(config: Mapping[Any, Any]) -> set[int]:
    """Token ids that a config gives a meaning, at any depth."""
    ids: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            ids |= _named_ids(value)
        elif isinstance(name, str) and name.endswith(("token_id", "token_index")):
            values = value if isinstance(value, list) else [value]
            ids |= {v for v in values if isinstance(v, int)}
    return ids


if __name__ == "__main__":
    main(sys.argv[1:])
