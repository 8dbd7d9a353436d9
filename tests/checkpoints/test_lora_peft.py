"""LoRA adapters that peft made, folded in by evomerge, by peft itself, and by mergekit's model+adapter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, open_parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.merging import merge
from evomerge.recipes import Mix, Recipe, params

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")

LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "down_proj"], "r": 4, "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 6},
        "alpha_pattern": {"model.layers.2.self_attn.q_proj": 3, "up_proj": 1}, "use_rslora": True,
    },
    "outer": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 4, "lora_alpha": 8},
    "saved": {"target_modules": ["k_proj"], "r": 4, "lora_alpha": 8,
        "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "square-flag": {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
    "gaussian": {"target_modules": ["gate_proj"], "r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian",
        "layers_to_transform": [1, 3]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, "use_dora": True},
    "dora-outer": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4, "lora_alpha": 6,
        "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
}  # fmt: skip
GPT2: dict[str, dict[str, Any]] = {
    "conv": {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
    "conv-flag-forgotten": {"target_modules": ["attn.c_proj", "wte"], "r": 4, "lora_alpha": 8},
    "conv-bias": {"target_modules": ["attn.c_attn"], "r": 4, "lora_alpha": 8, "bias": "lora_only"},
    "conv-dora": {
        "target_modules": ["attn.c_attn", "attn.c_proj"],
        "r": 4,
        "lora_alpha": 8,
        "fan_in_fan_out": True,
        "use_dora": True,
    },
    "conv-bias-all": {"target_modules": ["attn.c_attn"], "r": 4, "lora_alpha": 8, "bias": "all"},
}
DRIVER = """
import json, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

torch.set_num_threads(1)
job = json.load(sys.stdin)
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2,
    n_head=2)).save_pretrained(job["gpt2"])
for base, adapter, merged, settings in job["cases"]:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(adapter)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(fresh, adapter).merge_and_unload().save_pretrained(merged)
config = MergeConfiguration.model_validate(job["recipe"])
run_merge(config, job["out"], MergeOptions(lora_merge_cache=job["cache"], quiet=True, write_model_card=False))
"""


@pytest.fixture(scope="module")
def base(tiny32: dict[str, Path]) -> Checkpoint:
    return Checkpoint(tiny32["base"])


@pytest.fixture(scope="module")
def theirs(tiny32: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters made, saved, loaded and merged by peft, and a merge of mergekit's with two of them: one
    process for all.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no mergekit (and so no peft) in {ENVIRONMENT}; run scripts/make_mergekit_env")
    root = tmp_path_factory.mktemp("peft")
    cases = [
        (
            str(root / "gpt2" if name in GPT2 else tiny32["base"]),
            str(root / f"{name}-adapter"),
            str(root / f"{name}-merged"),
            settings,
        )
        for name, settings in (LLAMA | GPT2).items()
    ]
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(tiny32["base"]), "dtype": "float32",
        "models": [
            {"model": f"{tiny32['base']}+{root}/plain-adapter", "parameters": {"weight": 0.6}},
            {"model": f"{tiny32['math']}+{root}/patterns-adapter", "parameters": {"weight": 0.3}},
        ],
    }  # fmt: skip
    job = {
        "gpt2": str(root / "gpt2"),
        "cases": cases,
        "recipe": recipe,
        "out": str(root / "mergekit"),
        "cache": str(root / "cache"),
    }
    done = subprocess.run(
        [str(python), "-c", DRIVER], input=json.dumps(job), capture_output=True, text=True, timeout=280,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", [*LLAMA, *GPT2])
def test_peft_merges_the_same_weights(name: str, theirs: Path, base: Checkpoint) -> None:
    start = Checkpoint(theirs / "gpt2") if name in GPT2 else base
    ours, merged = AdaptedCheckpoint(start, theirs / f"{name}-adapter"), Checkpoint(theirs / f"{name}-merged")
    assert set(ours.tensors) == set(merged.tensors)
    for tensor in merged.tensors:
        torch.testing.assert_close(
            ours.tensor(tensor),
            merged.tensor(tensor),
            rtol=0,
            atol=4e-6,
            msg=lambda text, t=tensor: f"{t}: {text}",
        )
        if tensor not in ours.changed:
            assert torch.equal(ours.tensor(tensor), merged.tensor(tensor))
    assert ours.changed
    moved = [t for t in merged.tensors if not torch.equal(merged.tensor(t), start.tensor(t))]
    assert moved == [t for t in merged.tensors if not torch.equal(ours.tensor(t), start.tensor(t))]


def test_mergekit_reads_model_and_adapter_alike(
    theirs: Path, tiny32: dict[str, Path], base: Checkpoint
) -> None:
    parents = {
        "base": base,
        "a": open_parent(f"{tiny32['base']}+{theirs}/plain-adapter"),
        "b": open_parent(f"{tiny32['math']}+{theirs}/patterns-adapter"),
    }
    given = params({"weight": (0.6, 0.3)})
    outer = Mix("task_arithmetic", (("a", None), ("b", None)), ("base", None), given)
    layers = tuple(Mix("task_arithmetic", (("a", i), ("b", i)), ("base", i), given) for i in range(4))
    ours = dict(
        merge.merged_tensors(
            Recipe("base", layers, outer, outer, dtype="float32", out_dtype="float32"), parents
        )
    )
    merged = Checkpoint(theirs / "mergekit")
    assert set(ours) == set(merged.tensors)
    for name in ours:
        torch.testing.assert_close(ours[name], merged.tensor(name), rtol=0, atol=4e-6)
