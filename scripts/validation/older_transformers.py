"""Merged folders of 12 architectures in transformers 5 and in transformers 4; writes
results/older_transformers.md.

The tokenizer and its end token come from the second model of each merge, and both models have rotary
positions that are no class's default. Each folder is loaded in a process of its own by both versions: what
logits it gives, and whether a text ends at that token.

usage: python -m scripts.validation.older_transformers [--kinds 'llama;gemma2']   (needs
    scripts/make_transformers4_env)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.export.recipe_file import merge_recipe_file
from scripts.benchmarks import machine
from tests.support import architectures

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = tuple(kind for kind in architectures.KINDS if kind not in architectures.VISION)
THETA = 20.0
POSITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, positions of Llama 3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3, positions by YaRN": (
        "qwen3",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "gpt_neox, half of each head turned": ("gpt_neox", {"partial_rotary_factor": 0.5}),
    "phi3, half of each head turned": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3, positions by LongRoPE": (
        "phi3",
        {"rope_type": "longrope", "short_factor": [1.0, 3.0, 5.0, 7.0], "long_factor": [2.0, 4.0, 6.0, 8.0]},
    ),
}
"""What a row is called -> its architecture and what its config says of rotary positions beside the theta."""
END = "<|im_end|>"
CHAT = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"
LOADER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

class EndAt(LogitsProcessor):
    def __init__(self, length, token):
        self.length, self.token = length, token

    def __call__(self, tokens, scores):
        if tokens.shape[1] == self.length:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token] = 0
        return scores

folder, end = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
number = tokenizer.convert_tokens_to_ids(end)
with torch.no_grad():
    logits = model(tokens).logits
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12,
                          logits_processor=LogitsProcessorList([EndAt(15, number)]))
print("FOUND" + json.dumps({
    "version": transformers.__version__, "tokenizer": type(tokenizer).__name__, "eos": tokenizer.eos_token,
    "words": tokenizer("w1 w2 " + end)["input_ids"], "new": made.shape[1] - tokens.shape[1],
    "logits": logits[0, -1].tolist()}))
"""


@dataclass(frozen=True)
class Loaded:
    """What one version of transformers makes of a folder.

    facts: of the loader; error: its last line where it failed.
    """

    facts: Mapping[str, Any]
    error: str = ""

    @property
    def ends(self) -> bool:
        """Whether the text ended at the token that was forced as its fourth, within 12."""
        return self.facts.get("new") == 4


def transformers4() -> Path:
    """The folder that scripts/make_transformers4_env makes."""
    return Path(os.environ.get("EVOMERGE_TRANSFORMERS4_ENV") or REPOSITORY / ".venv-transformers4")


def chat_tokenizer(folder: Path) -> None:
    """Replaces a tiny model's tokenizer by one with turns and an end token of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*specials, *(f"w{i}" for i in range(58)), "<|im_start|>", END]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*specials, "<|im_start|>", END])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=END, unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def other_positions(folder: Path, changes: Mapping[str, Any]) -> None:
    """Gives a stored model rotary positions that are no default, as transformers 5 writes them."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters")
    if rope is None:
        return  # GPT-2's positions are embeddings
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for number, part in enumerate(nested or [rope], start=1):
        part.update({"rope_theta": THETA * number, **changes})
    file.write_text(json.dumps(config))


def merged(name: str, folder: Path) -> Path:
    """A merge of two tiny models of an architecture, with the second one's tokenizer.

    name: an architecture or one of POSITIONS.
    """
    kind, changes = POSITIONS.get(name, (name, {}))
    paths = architectures.build(folder, kind, torch.bfloat16, ("base", "math"))
    for path in paths.values():
        other_positions(path, changes)
    chat_tokenizer(paths["math"])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {paths['base']}\nparameters: {{weight: 0.5}}\nmodels:\n"
        f"  - {{model: {paths['base']}}}\n  - {{model: {paths['math']}}}\n"
        f"tokenizer_source: {paths['math']}\ndtype: bfloat16\n"
    )
    merge_recipe_file(recipe, folder / "out")
    return folder / "out"


def load(folder: Path, packages: Path | None = None) -> Loaded:
    """Loads a folder in a process of its own; packages: of another version of transformers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-c", LOADER, str(folder), END]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if done.returncode or not lines:
        return Loaded({}, (done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    return Loaded(json.loads(lines[-1].removeprefix("FOUND")))


def difference(one: Loaded, other: Loaded) -> float:
    """The largest difference of logits in standard deviations of the first."""
    a, b = (torch.tensor(loaded.facts["logits"]) for loaded in (one, other))
    return float((a - b).abs().max() / a.std())


def newer_keys_alone(folder: Path) -> Path:
    """Takes out of a merge's config what its base's has not: the keys of transformers 4."""
    config, base = (json.loads((at / "config.json").read_text()) for at in (folder, folder.parent / "base"))
    kept = {key: value for key, value in config.items() if key in base}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def compare(kinds: Iterable[str]) -> tuple[list[str], list[str]]:
    """(rows of the table, kinds that failed)."""
    rows, failed = [], []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = merged(kind, Path(scratch))
            new, old = load(folder), load(folder, transformers4())
            bare = old if old.error else load(newer_keys_alone(folder), transformers4())
        agree, row = row_of(kind, new, old, bare)
        rows.append(row)
        print(row, flush=True)
        if not agree:
            failed.append(kind)
    return rows, failed


def row_of(kind: str, new: Loaded, old: Loaded, bare: Loaded) -> tuple[bool, str]:
    """(whether both versions agree, the row). bare: transformers 4 without the keys written for it."""
    if new.error or old.error:
        return False, f"| {kind} | {new.error or 'loads'} | {old.error or 'loads'} | – | – | – | – |"
    gap = difference(new, old)
    same = new.facts["words"] == old.facts["words"] and new.facts["eos"] == old.facts["eos"] == END
    ends = f"{new.facts['new']} and {old.facts['new']}"
    without = "does not load" if bare.error else f"{difference(new, bare):.1e}"
    return (
        new.ends and old.ends and same and gap < 1e-4,
        f"| {kind} | {new.facts['version']} | {old.facts['version']} | {'the same' if same else 'others'} "
        f"| {ends} | {gap:.1e} | {without} |",
    )


def main() -> None:
    """Merges, loads and writes the report; exits with 1 where a folder does not load, end or agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=";".join((*KINDS, *POSITIONS)), help="separated by semicolons")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "older_transformers.md")
    args = parser.parse_args()
    if not transformers4().is_dir():
        sys.exit(f"{transformers4()} is missing; run scripts/make_transformers4_env")
    rows, failed = compare(args.kinds.split(";"))
    lines = [
        "# Merged folders in transformers 5 and 4",
        "",
        "Written by `python -m scripts.validation.older_transformers`: merges of two tiny models with the",
        f"tokenizer of the second, whose end token `{END}` the base's generation settings lack. The token is",
        "forced as the fourth new one of twelve: a text of four has ended there. Rotary positions begin at",
        f"theta {THETA:g}, which is no class's default. The last column is transformers 4 without the keys",
        "that the merge writes for it (`evomerge/merging/older_config_keys.py`). Gaps are in standard",
        "deviations of the logits.",
        "",
        f"{machine.stamp('torch')}.",
        "",
        "| architecture | loaded by | and by | tokens of a text | new tokens | gap of logits | without |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"{len(rows) - len(failed)} of {len(rows)} agree."
        + (f" Not: {', '.join(failed)}." if failed else ""),
    ]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if failed:
        sys.exit("a merged folder does not load, end or agree")


if __name__ == "__main__":
    main()
