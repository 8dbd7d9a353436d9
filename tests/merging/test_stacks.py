"""Layers that the base's config has no place for do not stack, and no folder is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import CheckpointError
from evomerge.export.recipe_file import merge_recipe_file
from tests.support import architectures
from tests.support.merge_cases import load_model
from tests.support.random_models import built


def stacked(base: Path, other: Path, first: int = 2, last: int = 4) -> Path:
    recipe = base.parent / "r.yaml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        f"  - sources: [{{model: {base}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {other}, layer_range: [{first}, {last}]}}]\ndtype: bfloat16\n"
    )
    merge_recipe_file(recipe, base.parent / "out")
    return base.parent / "out"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Llama", {"hidden_size": 48, "num_attention_heads": 6}, "hidden_size is 48 in .* and 32 in base"),
        ("Llama", {"intermediate_size": 64}, "intermediate_size is 64 in .* and 48 in base"),
        ("Llama", {"num_key_value_heads": 4}, "num_key_value_heads is 4 in .* and 2 in base"),
        ("Llama", {"num_attention_heads": 2, "num_key_value_heads": 1}, "cut into other heads"),
        ("Llama", {"vocab_size": 70}, r"'lm_head.weight' is \[70, 32\] from .* and \[64, 32\] in base"),
        ("Qwen2", {}, "self_attn.k_proj.bias.*stack layers of one architecture"),
        ("Llama", {"attention_bias": True}, "self_attn.k_proj.bias.*stack layers of one architecture"),
        ("Mixtral", {"num_local_experts": 4}, "block_sparse_moe|stack layers of one architecture"),
    ],
)
def test_layers_of_another_shape_or_kind_do_not_stack(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "other", 1, family, **changes)
    with pytest.raises(CheckpointError, match=words):
        stacked(base, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other", "r.yaml"]


def test_embeddings_with_more_rows_than_the_config_says_do_not_stack(tmp_path: Path) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "other", 1, vocab_size=70)
    (tmp_path / "r.yaml").write_text(
        f"merge_method: passthrough\nbase_model: {base}\nslices:\n"
        f"  - sources: [{{model: {other}, layer_range: [0, 2]}}]\n"
        f"  - sources: [{{model: {base}, layer_range: [2, 4]}}]\ndtype: bfloat16\n"
    )
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' is \[70, 32\]"):
        merge_recipe_file(tmp_path / "r.yaml", tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "qwen3_moe"])
def test_layers_of_the_bases_kinds_stack_and_load(kind: str, tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, kind, torch.bfloat16, ("base", "math"))
    assert load_model(stacked(paths["base"], paths["math"], 1, 4)).config.num_hidden_layers == 5
