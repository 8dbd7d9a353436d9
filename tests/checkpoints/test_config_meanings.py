"""Every number of a config that changes what the same weights compute is refused or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, check_compatible
from evomerge.checkpoints.comparison import doubts, meaningless
from evomerge.checkpoints.config_meanings import MEANINGS, differences, meaning_of
from evomerge.errors import CheckpointError
from tests.support.architectures import KINDS, VISION, build, skeleton
from tests.support.toy import in_process

TEXTS = tuple(kind for kind in KINDS if kind not in VISION)
TOKENS = torch.arange(48).reshape(2, 24) % 61 + 3


def others(key: str, value: Any) -> list[Any]:
    """Other values that a key of a config might have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [max(1, value // 2), value * 2]
    if isinstance(value, float):
        return [value * 2 + 0.1]
    if isinstance(value, str) and "act" in key:
        return ["relu" if value != "relu" else "silu"]
    if value is None and ("window" in key or "softcap" in key):
        return [4]
    if isinstance(value, dict) and "rope_theta" in value:
        return [{**value, "rope_theta": value["rope_theta"] * 50}]
    return []


def logits_under(model: Any, config: dict[str, Any]) -> torch.Tensor | None:
    """What the weights of a model compute under another config; None where they do not fit it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        other = type(model)(type(model.config).from_dict(config)).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            found: torch.Tensor = other(TOKENS).logits
    except (StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return found


@pytest.mark.parametrize("kind", TEXTS)
def test_what_changes_the_logits_of_the_same_weights_is_refused_or_named(kind: str) -> None:
    torch.manual_seed(0)
    model = skeleton(kind, torch.float32).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape) * 0.2)
    config = model.config.to_dict()
    before = logits_under(model, config)
    assert before is not None
    changing, silent, without = [], [], []
    for key, value in config.items():
        if key == "tie_word_embeddings":  # compared as tensors are: which has a head of its own
            continue
        for other in others(key, value):
            changed = {**config, key: other}
            after = logits_under(model, changed)
            if after is None or torch.equal(before, after):
                continue
            changing.append(key)
            shown = {found.key for found in differences(changed, config)}
            if not shown & {key, "rope_theta", "rope_scaling"}:
                silent.append((key, value, other))
            left_out = {k: v for k, v in config.items() if k != key}
            default = logits_under(model, left_out)
            if (
                default is not None
                and torch.equal(before, default)
                and not list(differences(changed, left_out))
            ):
                without.append((key, value, other))
    assert len(changing) >= 3, "the sweep sees nothing"
    assert silent == []
    assert without == [], "a config that leaves the key to its class"


def test_every_key_has_one_verdict_with_a_reason() -> None:
    assert len(MEANINGS) > 150
    assert {meaning.verdict for meaning in MEANINGS.values()} == {"refused", "named", "harmless"}
    assert all(len(meaning.reason.split()) > 3 for meaning in MEANINGS.values())
    assert meaning_of("a_key_of_tomorrow").verdict == "named"
    assert meaning_of("eos_token_id").verdict == meaning_of("_name_or_path").verdict == "harmless"


@pytest.mark.parametrize("key", sorted(set(MEANINGS) - {"rope_scaling"}))
def test_a_stated_difference_gets_its_verdict(key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    one, two = ({"model_type": "of nobody", key: value} for value in (2.0, 3.0))
    found = [difference.key for difference in differences(one, two)]
    assert found == ([] if meaning_of(key).verdict == "harmless" else [key])


def edited(folder: Path, **values: Any) -> Checkpoint:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return Checkpoint(folder)


def test_other_heads_of_the_same_matrices_are_refused_by_merges_and_searches(tmp_path: Path) -> None:
    paths = build(tmp_path, "llama", torch.bfloat16, ("base", "x"))
    base, other = (
        Checkpoint(paths["base"]),
        edited(paths["x"], num_attention_heads=2, num_key_value_heads=1, head_dim=16),
    )
    words = "head_dim is 16 in 'x' and 8 in base 'base': the same matrices are cut into other heads"
    assert words in (meaningless("x", other, "base", base) or "")
    with pytest.raises(CheckpointError, match="cut into other heads"):
        check_compatible({"base": base, "x": other}, "base")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {paths['base']}\nmodels:\n"
        f"  - {{model: {paths['base']}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {paths['x']}, parameters: {{weight: 1}}}}\ndtype: bfloat16\n"
    )
    code, _, err = in_process("merge", recipe, tmp_path / "out")
    assert code == CheckpointError.exit_code
    assert "cut into other heads" in err
    assert not (tmp_path / "out").exists()


def test_a_number_that_a_class_computes_is_not_taken_for_another(tmp_path: Path) -> None:
    one = {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 4, "head_dim": None}
    two = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    assert "refused" not in {found.meaning.verdict for found in differences(one, two)}


def test_a_window_that_both_configs_switch_off_is_no_difference(tmp_path: Path) -> None:
    one = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072}
    assert list(differences({**one, "sliding_window": 32768}, one)) == []
    on = {**one, "use_sliding_window": True}
    assert {found.key for found in differences({**on, "sliding_window": 32768}, on)} == {"sliding_window"}


def test_configs_of_two_versions_of_transformers_are_no_difference() -> None:
    older = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
    }
    assert list(differences(older, newer)) == []
    other = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert [found.key for found in differences(older, other)] == ["rope_scaling"]


def test_a_number_that_one_config_leaves_to_its_class_is_compared(tmp_path: Path) -> None:
    paths = build(tmp_path, "llama", torch.bfloat16, ("base", "x"))
    config = json.loads((paths["base"] / "config.json").read_text())
    del config["rms_norm_eps"]  # 1e-6 by its class
    (paths["base"] / "config.json").write_text(json.dumps(config))
    base = Checkpoint(paths["base"])
    assert not list(doubts("x", edited(paths["x"], rms_norm_eps=1e-6), "base", base))
    (found,) = doubts("x", edited(paths["x"], rms_norm_eps=1e-5), "base", base)
    assert "rms_norm_eps is 1e-05 in 'x' and 1e-06 in base 'base'" in found
