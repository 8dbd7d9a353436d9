"""Expressions of an adapter_config.json are compared with every module's name: none may take for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.checkpoints.lora_config import LoraConfig
from evomerge.errors import CheckpointError

MODULE = "model.layers.31.self_attn.q_proj"
HOSTILE = (
    "(a+)+$",
    r"(?:[\w.]+)+X",
    r"(?:\w|\w)*X",
    r"(\w*\.)*X",
    "(?:a?){60}a{60}",
    "a?" * 60 + "a" * 60,
    "(?:a|a)" * 40 + "X",
    r".*.*.*.*.*.*X",
    r"(.)\1+X",
    r"(?=(?:.+)+X)",
    "((((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9}){9})",
    "(" * 90 + "a" + ")" * 90 + "*",
    "x" * 1000,
)
REAL = {
    "q_proj": True,
    "layers.31.self_attn.q_proj": True,
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj": True,
    r".*\.self_attn\..*": True,
    r"layers\.(3[01]|2\d)\.self_attn\.[qv]_proj": True,
    r"^model\.layers\.31\..*_proj": True,
    "k_proj": False,
    r"layers\.(0|1|2)\..*": False,
}


def config(folder: Path, **patterns: dict[str, int]) -> LoraConfig:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8} | patterns))
    return LoraConfig(file)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("expression", HOSTILE, ids=lambda text: text[:30])
def test_an_expression_that_may_take_for_ever_is_refused_by_name(
    expression: str, key: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key} has the key '"):
        config(tmp_path, **{key: {expression: 4}})


@pytest.mark.parametrize("expression", REAL)
def test_expressions_of_adapters_are_taken(expression: str, tmp_path: Path) -> None:
    own = config(tmp_path, alpha_pattern={expression: 16})
    assert own.scale(MODULE, 8) == (2.0 if REAL[expression] else 1.0)


def test_the_slowest_expression_that_is_taken_comes_to_an_end(tmp_path: Path) -> None:
    own = config(tmp_path, alpha_pattern={"[^x]*[^x]*X": 16, "(?:a|b|c|d)(?:a|b|c|d)": 16})
    assert own.scale("a." * 100, 8) == 1.0


def test_too_many_expressions_and_names_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank_pattern has 6,000 keys"):
        config(tmp_path, rank_pattern={f"layer{i}": 4 for i in range(6000)})
    with pytest.raises(CheckpointError, match="is longer than 200 characters"):
        config(tmp_path, alpha_pattern={".*a": 4}).scale("a" * 300, 8)
