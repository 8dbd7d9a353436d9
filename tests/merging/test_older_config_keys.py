"""The config.json of a merge says the same to transformers 5 and 4."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.comparison import doubts
from evomerge.checkpoints.config_meanings import built_text_config, differences
from evomerge.checkpoints.reference import open_parent
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging.older_config_keys import with_older_keys
from scripts.validation.older_transformers import transformers4
from tests.support import architectures
from tests.support.text_architectures import CONFIGS

THETA, PART = 777.0, 0.5
READER = """
import json, sys
from transformers import CONFIG_MAPPING

NAMES = {"theta": ("rotary_emb_base", "rope_theta"), "part": ("rotary_pct", "partial_rotary_factor"),
         "scaling": ("rope_scaling",), "experts": ("num_experts", "num_local_experts")}
read = {}
for name, config in json.load(sys.stdin).items():
    if config["model_type"] not in CONFIG_MAPPING:
        continue
    try:
        built = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except Exception as error:
        read[name] = repr(error)
        continue
    read[name] = {what: next((getattr(built, key) for key in keys if hasattr(built, key)), None)
                  for what, keys in NAMES.items()}
print("READ" + json.dumps(read))
"""


def saved(name: str, **rope: Any) -> dict[str, Any]:
    """The config of an architecture as transformers 5 saves it, its rotary positions changed."""
    from transformers import CONFIG_MAPPING

    settings = dict(CONFIGS[name])
    config: dict[str, Any] = json.loads(
        CONFIG_MAPPING[settings.pop("model_type", name)](**settings).to_json_string()
    )
    parameters = config.get("rope_parameters")
    if parameters:
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        for part in nested or [parameters]:
            part.update({key: value for key, value in rope.items() if key != "partial_rotary_factor"})
            if "partial_rotary_factor" in part:
                part["partial_rotary_factor"] = rope.get("partial_rotary_factor", PART)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_5_reads_the_same_with_the_older_keys(name: str) -> None:
    config = saved(name, rope_theta=THETA)
    before = copy.deepcopy(config)
    out = with_older_keys(config)
    assert config == before
    assert {key: out[key] for key in config} == config
    one, two = built_text_config(config), built_text_config(out)
    assert getattr(two, "rope_parameters", None) == getattr(one, "rope_parameters", None)
    assert getattr(two, "num_experts", None) == getattr(one, "num_experts", None)
    assert not list(differences(out, config))
    assert not list(differences(config, out))
    assert with_older_keys(out) == out


@pytest.mark.skipif(not transformers4().is_dir(), reason="needs scripts/make_transformers4_env")
def test_transformers_4_reads_the_same_theta_rotary_part_and_experts() -> None:
    configs = {name: saved(name, rope_theta=THETA) for name in CONFIGS}
    with_rope = {name for name, config in configs.items() if config.get("rope_parameters")}
    written = {name: with_older_keys(config) for name, config in configs.items()}
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(written),
        env=os.environ | {"PYTHONPATH": str(transformers4()), "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=True,
    )
    read = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("READ"))[4:])
    refused = {name for name, values in read.items() if isinstance(values, str)}
    assert refused <= {"granitemoehybrid"}, read  # whose layer_types have other words
    assert len(read.keys() & with_rope) > 40
    for name in read.keys() - refused:
        values, built = read[name], built_text_config(configs[name])
        if name in with_rope and values["theta"] is not None:
            assert values["theta"] == THETA, name
        if "partial_rotary_factor" in (built.to_dict().get("rope_parameters") or {}):
            assert values["part"] == PART, name
        if hasattr(built, "num_experts") and values["experts"] is not None:
            assert values["experts"] == built.num_experts, name


@pytest.mark.parametrize(
    ("name", "rope", "older"),
    [
        (
            "llama",
            {"rope_type": "linear", "factor": 4.0},
            {"rope_theta": THETA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ("gpt_neox", {"rope_type": "default"}, {"rotary_emb_base": THETA, "rotary_pct": PART}),
        (
            "gemma3_text",
            {"rope_type": "default"},
            {"rope_theta": THETA, "rope_local_base_freq": THETA},
        ),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 2.0],
                "long_factor": [3.0, 4.0],
                "partial_rotary_factor": 0.5,
            },
            {
                "rope_theta": THETA,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
            },
        ),
        ("qwen3_moe", {}, {"rope_theta": THETA, "num_experts": 4}),
        ("gpt2", {}, {"n_ctx": CONFIGS["gpt2"]["n_positions"]}),
    ],
)
def test_these_keys_are_added(name: str, rope: dict[str, Any], older: dict[str, Any]) -> None:
    config = saved(name, rope_theta=THETA, **rope)
    out = with_older_keys(config)
    assert {key: value for key, value in out.items() if key not in config} == older


@pytest.mark.parametrize(("name", "part"), [("gpt_neox", 0.25), ("gpt_neox_japanese", 1.0)])
def test_the_default_part_of_gpt_neox_is_written_out(name: str, part: float) -> None:
    config = saved("gpt_neox") | {"model_type": name}
    del config["rope_parameters"]["partial_rotary_factor"]
    assert with_older_keys(config)["rotary_pct"] == part


def test_what_a_config_says_already_stays() -> None:
    older = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert with_older_keys(older) == older
    both = {"model_type": "llama", "rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}
    assert with_older_keys(both)["rope_theta"] == 5.0
    unknown = {"model_type": "no such model", "rope_parameters": {"rope_theta": 7.0}}
    assert with_older_keys(unknown) == unknown


def test_a_merge_is_merged_with_its_base_without_a_word(tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, "qwen3_moe", torch.float32, ("base", "math"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: linear\nparameters: {{weight: 0.5}}\nmodels:\n  - {{model: {paths['base']}}}\n"
        f"  - {{model: {paths['math']}}}\ndtype: float32\n"
    )
    merge_recipe_file(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    merged, base = open_parent(str(tmp_path / "out")), open_parent(str(paths["base"]))
    assert not list(doubts("merged", merged, "base", base))
    assert not list(doubts("base", base, "merged", merged))
