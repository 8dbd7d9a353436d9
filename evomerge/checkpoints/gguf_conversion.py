"""Writes a GGUF file as a model folder, by transformers: `python -m evomerge.checkpoints.gguf_conversion`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from evomerge.checkpoints.gguf import TYPE


def convert(file: Path, folder: Path) -> None:
    """Writes config, tokenizer and dequantised weights.

    Args:
        file: The GGUF file.
        folder: Where; exists.

    Raises:
        Exception: Whatever transformers raises of what it cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = str(file.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=file.name,
        dtype=getattr(torch, TYPE),
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model = model.to(getattr(torch, TYPE))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = getattr(torch, TYPE)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
