"""Writes a GGUF file as a model folder, by transformers: `python -m evomerge.checkpoints.gguf_conversion`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from evomerge._escaping import one_line
from evomerge.checkpoints.gguf import TYPE

_HUB = "https://huggingface.co/"


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
    write_card(file, folder)


def write_card(file: Path, folder: Path) -> None:
    """Writes the license and the base models that the file's metadata name as the card of the folder.

    Args:
        file: The GGUF file.
        folder: Where README.md is written, if the metadata name a license or a base model of the Hub.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def text(key: str) -> str:
        value = fields[key].contents() if key in fields else ""
        return value if isinstance(value, str) and value.isprintable() else ""

    count = sum(re.fullmatch(r"general\.base_model\.\d+\.repo_url", key) is not None for key in fields)
    addresses = [text(f"general.base_model.{number}.repo_url") for number in range(count)]
    names = [address.removeprefix(_HUB) for address in addresses if address.startswith(_HUB)]
    card = {
        "license": text("general.license"),
        "license_name": text("general.license.name"),
        "license_link": text("general.license.link"),
        "base_model": names,
    }
    stated = {key: value for key, value in card.items() if value}
    if stated:
        lines = [f"{key}: {json.dumps(value)}" for key, value in stated.items()]
        about = f"# {one_line(file.name)}\n\nLicense and base models are those of the file's metadata.\n"
        (folder / "README.md").write_text("\n".join(["---", *lines, "---", about]), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
