"""A tokenizer.json that grows a text without bounds, or never ends, is refused by the name of the step."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.tokenizer_checks import check_tokenizer
from evomerge.errors import CheckpointError
from evomerge.merging import model_loading
from evomerge.merging.vocabulary import tokenizer_files
from tests.support.toy import zoo_folder


def replaced(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def charsmap(*texts: bytes) -> dict[str, Any]:
    trie = bytes(16)
    data = len(trie).to_bytes(4, "little") + trie + b"\0".join(texts) + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def in_sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(expression: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        ],
    }


HOSTILE: dict[str, tuple[str, Any]] = {
    "100 to the 6th": ("normalizer", in_sequence(*[replaced("a" * 100)] * 6)),
    "one long text": ("normalizer", replaced("a" * 2000)),
    "nested sequences": ("normalizer", in_sequence(*[in_sequence(replaced("a" * 40))] * 3)),
    "a map of sentencepiece": ("normalizer", charsmap(b"a", b"a" * 5000)),
    "a decoder": ("decoder", {"type": "Sequence", "decoders": [replaced("a" * 100)] * 6}),
    "a nested repeat": ("pre_tokenizer", split("(a+)+$")),
    "a repeated choice": ("pre_tokenizer", split("(?:a|a)*$")),
    "a repeated option": ("pre_tokenizer", split("(?:a?b?)*$")),
    "a counted nested repeat": ("pre_tokenizer", split("(a*){50}$")),
    "repeats in a row": ("pre_tokenizer", split("z*z*z*z*z*z*!")),
    "very many repeats": ("pre_tokenizer", split("a*b*c*d*e*f*g*h*i*j*k*l*m*n*!")),
    "a replaced nested repeat": ("normalizer", replaced("", Regex="(x+x+)+y")),
    "a look ahead": ("pre_tokenizer", split("(?=(a+)+b)")),
    "padding": ("padding", {"strategy": {"Fixed": 10**9}, "pad_id": 0}),
    "padding to a multiple": ("padding", {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}),
}
REAL = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll"
    r"|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\s{2,}|[\n\r\t]",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
)


def changed(folder: Path, part: str, value: Any) -> Path:
    """A copy of a trained model whose tokenizer.json has another part."""
    shutil.copytree(zoo_folder() / "base", folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    return folder


@pytest.mark.parametrize("what", HOSTILE)
def test_a_tokenizer_without_bounds_is_refused_before_it_is_loaded(what: str, tmp_path: Path) -> None:
    part, value = HOSTILE[what]
    parent = Checkpoint(changed(tmp_path / "model", part, value))
    for load in (
        lambda: model_loading.load_tokenizer(parent),
        lambda: tokenizer_files.read_tokens({"a": parent}),
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: it") as raised:
            load()
        assert str(parent.path) in str(raised.value)


@pytest.mark.parametrize("text", ["[", "[1]", "[" * 5000, "\xff"])
def test_a_tokenizer_file_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        check_tokenizer(tmp_path)


@pytest.mark.parametrize("expression", REAL)
def test_expressions_that_models_have_are_taken(expression: str, tmp_path: Path) -> None:
    check_tokenizer(changed(tmp_path / "model", "pre_tokenizer", split(expression)))


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFKC"},
        in_sequence({"type": "Prepend", "prepend": "▁"}, replaced("▁", String=" ")),
        in_sequence({"type": "NFKD"}, {"type": "Lowercase"}, {"type": "StripAccents"}),
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        in_sequence(charsmap(b"a", b"ffi"), replaced(" ", Regex=" {2,}")),
    ],
    ids=str,
)
def test_normalizers_that_models_have_are_taken(normalizer: Any, tmp_path: Path) -> None:
    check_tokenizer(changed(tmp_path / "model", "normalizer", normalizer))
