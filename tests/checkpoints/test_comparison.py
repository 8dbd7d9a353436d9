"""Two models side by side: the first true difference is named, with both numbers and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, check_compatible
from evomerge.checkpoints.comparison import doubts, first_difference, twins
from evomerge.errors import CheckpointError
from evomerge.export.recipe_file import merge_recipe_file
from tests.support.random_models import built
from tests.support.toy import in_process


def said(one: Path, base: Path, **options: Any) -> str:
    found = first_difference(
        "x", Checkpoint(one), "base", Checkpoint(base), rows="give a tokenizer", **options
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 64 in 'x' and 32 in base 'base'"),
        ({"intermediate_size": 96}, "intermediate_size is 96 in 'x' and 48 in base 'base'"),
        ({"num_hidden_layers": 3}, "'x' has 3 layers and base 'base' 4"),
        ({"num_hidden_layers": 6}, "'x' has 6 layers and base 'base' 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 in 'x' and 2 in base 'base'"),
        ({"vocab_size": 70}, "have 70 and 64 embedding rows, so their vocabularies differ; give a tokenizer"),
        ({"tie_word_embeddings": True}, "'x' ties its output head to its embeddings and base 'base' has"),
        ({"attention_bias": True}, None),
    ],
)
def test_the_first_true_difference_is_named_with_both_numbers(
    changes: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "x", 1, **changes)
    if words is None:
        assert first_difference("x", Checkpoint(other), "b", Checkpoint(base), rows="r") is None
    else:
        found = said(other, base)
        assert words in found
        with pytest.raises(CheckpointError, match="'x'"):
            check_compatible({"base": Checkpoint(base), "x": Checkpoint(other)}, "base")
        if "vocab_size" not in changes:
            assert "vocabular" not in found
            assert "architectures" not in found


def test_a_deeper_model_fits_where_layers_are_chosen(tmp_path: Path) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "x", 1, num_hidden_layers=6)
    assert first_difference("x", Checkpoint(other), "b", Checkpoint(base), rows="r", deeper=True) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta is 1,000,000 in 'x'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            "rope_scaling is {'rope_type': 'linear'",
        ),
        ({"rms_norm_eps": 0.01}, "rms_norm_eps is 0.01 in 'x' and 1e-06 in base 'base'"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu in 'x' and silu in base 'base'"),
        ({"attention_bias": True}, "16 tensors of 'x' have no like in base 'base'"),
        ({"max_position_embeddings": 128, "initializer_range": 0.5, "bos_token_id": 7}, None),
    ],
)
def test_config_numbers_that_change_what_weights_mean_are_named(
    changes: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    base, other = Checkpoint(built(tmp_path / "base")), Checkpoint(built(tmp_path / "x", 1, **changes))
    found = " | ".join(doubts("x", other, "base", base))
    assert (words or "") in found
    if words is None:
        assert found == ""


def test_a_theta_that_one_config_leaves_out_is_compared_all_the_same(tmp_path: Path) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "x", 1)
    for folder, theta in ((base, None), (other, 1e6)):
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_parameters", None)
        (folder / "config.json").write_text(json.dumps(config | ({"rope_theta": theta} if theta else {})))
    (found,) = doubts("x", Checkpoint(other), "base", Checkpoint(base))
    assert "rope_theta is 1,000,000 in 'x' and not given in base 'base'" in found


def test_another_architecture_of_one_shape_is_named(tmp_path: Path) -> None:
    base, other = built(tmp_path / "base"), built(tmp_path / "x", 1, "Mistral", sliding_window=None)
    found = " | ".join(doubts("x", Checkpoint(other), "base", Checkpoint(base)))
    assert "'x' is MistralForCausalLM and base 'base' LlamaForCausalLM" in found


def test_a_trained_head_over_a_tied_base_is_named(tmp_path: Path) -> None:
    base = built(tmp_path / "base", tie_word_embeddings=True)
    other = built(tmp_path / "x", 1)
    found = " | ".join(doubts("x", Checkpoint(other), "base", Checkpoint(base)))
    assert "the output head lm_head.weight of 'x' is its own" in found
    file = other / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert not list(doubts("x", Checkpoint(other), "base", Checkpoint(base)))


def test_the_same_parent_twice_and_one_that_is_the_base_are_named(tmp_path: Path) -> None:
    base, one = built(tmp_path / "base"), built(tmp_path / "one", 1)
    shutil.copytree(one, tmp_path / "again")
    shutil.copytree(base, tmp_path / "copy")
    names = ("base", "one", "again", "copy")
    found = list(twins({name: Checkpoint(tmp_path / name) for name in names}, "base"))
    assert found == [
        "'again' and 'one' have exactly the same weights: one model counts twice",
        "'copy' has exactly the weights of base 'base': it adds nothing to a merge",
    ]


def test_a_merge_says_what_speaks_against_it(tmp_path: Path) -> None:
    base = built(tmp_path / "base")
    other = built(tmp_path / "x", 1, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    wide = built(tmp_path / "wide", 1, hidden_size=64)
    recipe = tmp_path / "r.yaml"
    text = (
        "merge_method: linear\nbase_model: {base}\nmodels:\n"
        "  - {{model: {base}, parameters: {{weight: 1}}}}\n"
        "  - {{model: {other}, parameters: {{weight: 1}}}}\ndtype: bfloat16\n"
    )
    recipe.write_text(text.format(base=base, other=other))
    code, out, err = in_process("merge", recipe, tmp_path / "out")
    assert code == 0, err
    assert "rope_theta is 1,000,000" in out + err
    recipe.write_text(text.format(base=base, other=wide))
    code, out, err = in_process("merge", recipe, tmp_path / "out2")
    assert code == CheckpointError.exit_code
    assert "hidden_size is 64" in err
    assert "vocabular" not in err


def with_words(folder: Path, count: int, tokenizer: Path, rows: int, seed: int) -> Path:
    """A model with this number of words and rows; its words are the first or more than the tokenizer's."""
    built(folder, seed, vocab_size=rows)
    data = json.loads((tokenizer / "tokenizer.json").read_text())
    words = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)[:count]
    words += [f"more{i}" for i in range(count - len(words))]
    data["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < count]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    shutil.copy(tokenizer / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize("base_words", [61, 64])
@pytest.mark.parametrize(("words", "rows"), [(66, 66), (66, 72), (62, 62), (61, 61), (60, 128)])
def test_the_recipe_that_a_refusal_of_other_tokens_names_makes_a_parent_that_is_taken(
    words: int, rows: int, base_words: int, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Of a base that has more rows than tokens too; the advice before it led into the next refusal."""
    base = Checkpoint(with_words(tmp_path / "base", base_words, tiny["base"], 64, 0))
    other = Checkpoint(with_words(tmp_path / "with 'odd\" name", words, tiny["base"], rows, 1))
    with pytest.raises(CheckpointError, match="their vocabularies differ") as caught:
        check_compatible({"base": base, "other": other}, "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(str(caught.value).partition("evomerge merge, the recipe ")[2])
    merge_recipe_file(recipe, tmp_path / "brought")
    brought = Checkpoint(tmp_path / "brought")
    assert check_compatible({"base": base, "other": brought}, "base") == ()
    vocabularies = [
        json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for folder in (base.path, brought.path)
    ]
    assert vocabularies[0] == vocabularies[1]
    shared = min(words, base_words)
    table = "model.embed_tokens.weight"
    assert torch.equal(brought.tensor(table)[:shared], other.tensor(table)[:shared]), "its own rows"
