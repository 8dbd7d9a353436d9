"""What a model answers to fixed tokens, and the same of a checkpoint read back in a process that knows nothing of how it was made.

    python -m evomerge.export.reload_check CHECKPOINT QUESTIONS ANSWERS

reads a Hugging Face folder with transformers alone, asks it what the file QUESTIONS holds and writes ANSWERS, with a digest
of every tensor; both are safetensors files.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evomerge.errors import CheckpointError

ROWS, LENGTH, NEW = 3, 12, 16  # token rows, tokens in a row, tokens generated


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint as transformers loads it. missing: tensors that the model has and the folder does not, left at random;
    surplus: those that the folder alone has; misshapen: those whose shapes differ, left at random."""

    model: nn.Module
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """A phrase for each tensor that is not the model's own."""
        found = [f"{name} is missing" for name in self.missing] + [
            f"{name} is one too many" for name in self.surplus
        ]
        return (*found, *(f"{name} has another shape" for name in self.misshapen))


def load(path: Path, dtype: str, attention: str | None = None) -> Loaded:
    """A Hugging Face folder as a live model in evaluation mode; never runs code from it. attention: implementation, None for the default.

    Raises CheckpointError if transformers refuses it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    asked: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    refusal = ""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            model, said = kind.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **asked,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            refusal = refusal or str(error).splitlines()[0]
            continue
        misshapen = [name if isinstance(name, str) else name[0] for name in said["mismatched_keys"]]
        live: nn.Module = model.eval().requires_grad_(False)
        return Loaded(
            live,
            *(tuple(sorted(names)) for names in (said["missing_keys"], said["unexpected_keys"], misshapen)),
        )
    raise CheckpointError(f"transformers cannot load {path}: {refusal}")


def questions(model: nn.Module) -> dict[str, Tensor]:
    """Token rows for a model: 'ids' and 'mask' [ROWS, LENGTH], the second row padded on the left; 'banned' ids of no word [N].

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
    """'logits' [tokens that are not padding, V], 'steps' [ROWS, NEW, V] of a greedy generation with the model's cache, its
    'tokens' [ROWS, NEW]; on the CPU, in the model's type."""
    from transformers import GenerationConfig

    live: Any = model
    device = next(model.parameters()).device
    ids, mask = (asked[name].to(device) for name in ("ids", "mask"))
    greedy = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, suppress_tokens=asked["banned"].tolist() or None,
    )  # fmt: skip
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
    """The program that the docstring of this file describes. The questions' metadata: dtype, device, attention, threads."""
    folder, asked, out = arguments
    with safe_open(asked, framework="pt") as file:
        settings = file.metadata()
    torch.set_num_threads(int(settings["threads"]))
    loaded = load(Path(folder), settings["dtype"], settings["attention"])
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
