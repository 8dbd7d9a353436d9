"""What scripts/validation/llama_cpp_conversion.py finds in a file that says otherwise than its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.validation.llama_cpp_conversion import Converted, wrong

CONFIG = {
    "num_hidden_layers": 4,
    "eos_token_id": 2,
    "vocab_size": 3,
    "num_local_experts": 8,
    "rope_parameters": {"rope_theta": 20.0},
}
FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.rope.freq_base": 20.0,
    "llama.expert_count": 8,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"llama.rope.freq_base": 10000.0}, ["llama.rope.freq_base is 10000.0, not 20.0"]),
        ({"llama.expert_count": None}, ["llama.expert_count is None, not 8"]),
        ({"llama.block_count": 3}, ["llama.block_count is 3, not 4"]),
        ({"tokenizer.ggml.eos_token_id": 0}, ["tokenizer.ggml.eos_token_id is 0, not 2"]),
        ({"tokenizer.ggml.tokens": ["a"]}, ["1 tokens, not 3"]),
    ],
)
def test_what_the_file_says_otherwise_is_named(
    changed: dict[str, Any], found: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert wrong(tmp_path, Converted(FIELDS | changed, 12)) == found


def test_a_folder_that_is_not_converted_is_its_error(tmp_path: Path) -> None:
    assert wrong(tmp_path, Converted({}, 0, "ValueError: no such model")) == ["ValueError: no such model"]
