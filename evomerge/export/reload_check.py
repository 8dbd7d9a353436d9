"""What a model answers to fixed tokens, and the same of a checkpoint read back in a process that knows
nothing of how it was made.

    python -m evomerge.export.reload_check CHECKPOINT QUESTIONS ANSWERS

reads a Hugging Face folder with transformers alone, asks it what the file QUESTIONS holds and writes ANSWERS,
with a digest
of every tensor; both are safetensors files.
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


def questions(model: nn.Module) -> dict[str, Tensor]:
    """Token rows for a model: 'ids' and 'mask' [ROWS, LENGTH], the second row padded on the left; 'banned'
    ids of no word [N].

    Words stay clear of the ids that the config gives a meaning, such as an image's place.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    banned = sorted(_named_ids(config.to_dict()) & set(range(text.vocab_size)))
    words = torch.tensor(sorted(set(range(min(text.vocab_size, 1 << 16))) - set(banned)))
    drawn = torch.randint(len(words), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, : LENGTH // 3] = 0
    return {"ids": words[drawn], "mask": mask, "banned": torch.tensor(banned, dtype=torch.long)}


def answers(model: nn.Module, asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """'logits' [tokens that are not padding, V], 'steps' [ROWS, NEW, V] of a greedy generation with the
    model's cache, its
    'tokens' [ROWS, NEW]; on the CPU, in the model's type."""
    from transformers import GenerationConfig

    live: Any = model
    device = next(model.parameters()).device
    ids, mask = (asked[name].to(device) for name in ("ids", "mask"))
    greedy = GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        suppress_tokens=asked["banned"].tolist() or None,
    )
    own, live.generation_config = (
        live.generation_config,
        GenerationConfig(),
    )  # settings of its own would change the tokens
    try:
        with torch.no_grad():
            logits = live(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            found = live.generate(ids, attention_mask=mask, generation_config=greedy)
    finally:
        live.generation_config = own
    steps, tokens = torch.stack(found.logits, 1), found.sequences[:, ids.shape[1] :]
    return {
        name: tensor.cpu().contiguous()
        for name, tensor in (("logits", logits), ("steps", steps), ("tokens", tokens))
    }


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of type, shape and bits of every parameter and saved buffer, by its name in the model."""
    found = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def main(arguments: Sequence[str]) -> None:
    """The program that the docstring of this file describes. The questions' metadata: dtype, device,
    attention, threads."""
    folder, asked, out = arguments
    with safe_open(asked, framework="pt") as file:
        settings = file.metadata()
    torch.set_num_threads(int(settings["threads"]))
    loaded = load_model(Path(folder), settings["dtype"], settings["attention"])
    if loaded.faults:
        raise CheckpointError(
            f"{len(loaded.faults)} tensors of {folder} are not the model's: {'; '.join(loaded.faults[:3])}"
        )
    save_file(
        answers(loaded.model.to(settings["device"]), load_file(asked)), out, metadata=digests(loaded.model)
    )


def _named_ids(config: Mapping[Any, Any]) -> set[int]:
    """Token ids that a config gives a meaning, at any depth."""
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _named_ids(value)
        elif isinstance(name, str) and name.endswith(("token_id", "token_index")):
            found |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
