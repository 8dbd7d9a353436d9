"""What a config.json would have a library fetch, import or build is refused by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.config_checks import REFUSED
from evomerge.errors import CheckpointError
from evomerge.merging import model_loading
from tests.support.toy import llama

PLANTED: dict[str, Any] = {
    "attn_implementation": "owner/repo",
    "_attn_implementation": "owner/repo@main:flash",
    "_attn_implementation_internal": {"": "eager", "vision_config": "owner/repo"},
    "experts_implementation": "owner/repo",
    "_experts_implementation": "sonicmoe",
    "_experts_implementation_internal": ["owner/repo"],
    "kernel_config": {"RMSNorm": "owner/repo:RMSNorm"},
    "use_kernels": True,
    "quantization_config": {"quant_method": "aqlm"},
    "compression_config": {"quant_method": "compressed-tensors"},
    "transformers_weights": "other.safetensors",
    "use_pretrained_backbone": True,
    "backbone": "hf-hub:owner/repo",
    "architecture": "local-dir:/tmp/other",
    "backbone_kwargs": {"checkpoint_path": "/tmp/other.pth"},
    "model_args": {"pretrained_cfg": {"url": "http://localhost/x.pth"}},
    "fusion_config": {"attention": True},
    "distributed_config": {"tp_plan": "auto"},
}


def changed(folder: Path, **entries: Any) -> Path:
    """A small Llama whose config has more entries."""
    file = llama(folder, 1, layers=2) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def test_every_entry_that_is_refused_is_planted() -> None:
    assert set(PLANTED) == set(REFUSED)


@pytest.mark.parametrize("inside", [None, "vision_config", "parts"])
@pytest.mark.parametrize("key", PLANTED)
def test_an_entry_that_has_transformers_fetch_or_import_is_refused_by_name(
    key: str, inside: str | None, tmp_path: Path
) -> None:
    entries: dict[str, Any] = {key: PLANTED[key]}
    if inside is not None:
        entries = {inside: entries if inside == "vision_config" else [{"one": entries}]}
    with pytest.raises(
        CheckpointError, match=rf"config\.json.*({re.escape(key)}|quantization_config)"
    ) as raised:
        Checkpoint(changed(tmp_path / "model", **entries))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "paged|owner/repo", "kernels-community/flash-attn2", 7]
)
def test_attention_that_transformers_has_not_itself_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="_attn_implementation"):
        Checkpoint(changed(tmp_path / "model", _attn_implementation=name))


@pytest.mark.parametrize("name", [None, "eager", "sdpa", "flex_attention", {"": "sdpa"}])
def test_transformers_own_attention_is_taken(name: Any, tmp_path: Path) -> None:
    assert Checkpoint(changed(tmp_path / "model", _attn_implementation=name)).layout.num_layers == 2


def test_programs_in_a_models_folder_are_not_run(tmp_path: Path) -> None:
    """auto_map and custom_generate are transformers' own ways to run what lies in the folder."""
    mark, kinds = tmp_path / "owned", ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    folder = changed(tmp_path / "model", auto_map={kind: f"theirs.{kind}" for kind in kinds})
    (folder / "custom_generate").mkdir()
    for file in (
        folder / "theirs.py",
        folder / "custom_generate" / "generate.py",
        folder / "requirements.txt",
    ):
        file.write_text(f"open({str(mark)!r}, 'w').close()\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}})
    )
    parent = Checkpoint(folder)
    model_loading.load_base(parent, "float32")
    with pytest.raises(Exception, match="tokenizer"):
        model_loading.load_tokenizer(parent)
    assert not mark.exists()


def test_a_model_with_an_adapter_beside_it_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/repo"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*base\+adapter"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_secret", "vocab.txt", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["a device", "a pipe", "a link out", "a folder", "4 TB", "a loop"])
def test_a_file_beside_the_weights_is_a_file_of_the_folder(name: str, how: str, tmp_path: Path) -> None:
    """An export copies tokenizer files: a link would take any file of the user's along."""
    file = changed(tmp_path / "model") / name
    (tmp_path / "secret").write_text("mine")
    if how == "a pipe":
        os.mkfifo(file)
    elif how == "a folder":
        file.mkdir()
    elif how == "4 TB":
        with file.open("wb") as opened:
            opened.truncate(1 << 42)
    else:
        file.symlink_to({"a device": "/dev/zero", "a link out": tmp_path / "secret", "a loop": file}[how])
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(file.parent)


# ---- numbers -----------------------------------------------------------------------------------------------

HOSTILE = {
    "vocab_size": 10**12,
    "hidden_size": 10**9,
    "num_attention_heads": 10**8,
    "num_local_experts": 10**6,
    "max_position_embeddings": 10**400,
    "rms_norm_eps": float("nan"),
    "n_positions": 10**9,
    "head_dim": -(10**10),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_number_beyond_all_weights_is_refused_by_name(key: str, tmp_path: Path) -> None:
    for entries in ({key: HOSTILE[key]}, {"audio_config": {key: HOSTILE[key]}}):
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{key} is"):
            Checkpoint(changed(tmp_path / f"model{len(str(entries))}", **entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_size": -8},
        {"num_key_value_heads": 0},
        {"intermediate_size": 0},
        {"intermediate_size": 60_000},
        {"hidden_act": "no such function"},
        {"hidden_act": 7},
        {"vocab_size": "many"},
        {"vocab_size": None},
        {"rope_parameters": {"rope_type": "no such type", "rope_theta": -1}},
        {"rope_theta": "x"},
        {"attention_bias": []},
        {"dtype": "no such type"},
        {"model_type": "no such model"},
        {"model_type": ["llama"]},
        {"architectures": 7},
        {"layer_types": ["x"]},
        {"pad_token_id": 10**9},
        {"bos_token_id": "x"},
        {"head_dim": 0},
        {"max_position_embeddings": -1},
    ],
    ids=str,
)
def test_a_hostile_config_is_one_sentence_or_none(entries: dict[str, Any], tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", **entries)
    said = f"{folder}: nothing"
    try:
        model_loading.load_base(Checkpoint(folder), "float32")
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert str(folder) in said


def test_a_model_far_larger_than_its_weights_is_not_built(tmp_path: Path) -> None:
    folder = changed(tmp_path / "model", vocab_size=60_000, hidden_size=65_536, intermediate_size=65_536)
    with pytest.raises(CheckpointError, match=r"config\.json describes a model of .* numbers"):
        model_loading.load_base(Checkpoint(folder), "float32")
