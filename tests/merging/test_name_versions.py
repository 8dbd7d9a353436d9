"""Folders of one architecture under other tensor names, or with joined tensors, merge alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.checkpoints import Checkpoint, check_compatible
from evomerge.checkpoints.tensor_names import is_buffer
from evomerge.errors import CheckpointError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging.name_versions import RenamedParent, with_names_of_base
from evomerge.recipes import mergekit_yaml
from tests.support import architectures

Tensors = dict[str, Tensor]


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """The experts of each layer of a Mixtral in one tensor, as transformers 5 holds them in memory."""
    out = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    layers = {name.split(".")[2] for name in tensors if "block_sparse_moe" in name}
    for layer in layers:
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        up = [
            torch.cat([tensors[f"{old}.experts.{e}.w1.weight"], tensors[f"{old}.experts.{e}.w3.weight"]])
            for e in range(4)
        ]
        down = [tensors[f"{old}.experts.{e}.w2.weight"] for e in range(4)]
        out[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        out[f"{new}.experts.gate_up_proj"], out[f"{new}.experts.down_proj"] = (
            torch.stack(up),
            torch.stack(down),
        )
    return out


def newer_vlm(name: str) -> str:
    """A name of transformers 4.48 and before as 4.52 has it in memory: the language model inside 'model'."""
    if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.")):
        return "model." + name
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.layers") else name


def newer_qwen_vl(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name


VERSIONS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "gpt2 with its prefix": ("gpt2", renamed(lambda name: "transformer." + name)),
    "llama without its prefix": ("llama", renamed(lambda name: name.removeprefix("model."))),
    "qwen3 without its prefix": ("qwen3", renamed(lambda name: name.removeprefix("model."))),
    "experts of a layer in one tensor": ("mixtral", fused),
    "a language model inside the larger one": ("qwen2_5_vl", renamed(newer_qwen_vl)),
    "llava of transformers 4.52": ("llava", renamed(newer_vlm)),
    "gemma 3 of transformers 4.52": ("gemma3", renamed(newer_vlm)),
}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def merged(folder: Path, base: Path, other: Path) -> Tensors:
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
        f"  - {{model: {other}, parameters: {{weight: 0.6}}}}\ndtype: bfloat16\n"
    )
    out = folder / f"{base.name}-{other.name}"
    merge_recipe_file(recipe, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_with_names_of_another_version_merges_as_with_the_bases(version: str, tmp_path: Path) -> None:
    kind, change = VERSIONS[version]
    paths = architectures.build(tmp_path, kind, torch.bfloat16, ("base", "math"))
    for name in ("base", "math"):
        shutil.copytree(paths[name], tmp_path / f"{name}-otherwise")
        rewrite(tmp_path / f"{name}-otherwise", change)
    assert set(load_file(tmp_path / "base-otherwise" / "model.safetensors")) != set(
        load_file(paths["base"] / "model.safetensors")
    )
    expected = merged(tmp_path, paths["base"], paths["math"])
    found = merged(tmp_path, paths["base"], tmp_path / "math-otherwise")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    back = merged(tmp_path, tmp_path / "base-otherwise", paths["math"])
    again = change(expected)
    assert back.keys() == again.keys()
    assert [name for name in again if not torch.equal(again[name], back[name])] == []


def test_a_search_says_that_names_are_another_versions(tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, "mixtral", torch.bfloat16, ("base", "math"))
    parents = {"base": Checkpoint(paths["base"]), "math": Checkpoint(rewrite(paths["math"], fused))}
    with pytest.raises(
        CheckpointError, match=r"stores .* under the names of another version .*evomerge merge"
    ):
        check_compatible(parents, "base")


def test_a_deeper_model_is_renamed_to_its_own_depth(tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, "llama", torch.bfloat16, ("base", "math"))
    rewrite(
        paths["base"],
        lambda tensors: {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if not name.startswith("model.layers.3.")
        },
    )
    config = (paths["base"] / "config.json").read_text()
    changed = config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3')
    (paths["base"] / "config.json").write_text(changed)
    opened = {str(path): Checkpoint(path) for path in paths.values()}
    (tmp_path / "r.yaml").write_text(
        f"merge_method: passthrough\nbase_model: {paths['base']}\nslices:\n"
        f"  - sources: [{{model: {paths['base']}, layer_range: [0, 3]}}]\n"
        f"  - sources: [{{model: {paths['math']}, layer_range: [2, 4]}}]\ndtype: bfloat16\n"
    )
    merge_recipe_file(tmp_path / "r.yaml", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = opened[str(paths["math"])]
    for suffix in own.layout.layer_suffixes(3):
        assert torch.equal(found[f"layers.4.{suffix}"], own.tensor(f"model.layers.3.{suffix}")), suffix


def test_models_that_need_no_other_names_stay_as_they_are(tiny: dict[str, Path]) -> None:
    from evomerge import _yaml

    models = f"[{{model: {tiny['math']}}}]\nparameters: {{weight: 1}}"
    text = f"merge_method: linear\nbase_model: {tiny['base']}\nmodels: {models}\n"
    opened = {str(path): Checkpoint(path) for path in (tiny["base"], tiny["math"])}
    recipe = mergekit_yaml.load(
        [_yaml.parse(text, "r.yaml")],
        lambda name: opened[name].layout.num_layers,
        lambda name: "bfloat16",
        "float32",
    )
    found = with_names_of_base(recipe, opened)
    assert all(found[name] is opened[name] for name in opened)
    assert not any(isinstance(parent, RenamedParent) for parent in found.values())


@pytest.mark.parametrize(
    ("name", "shape", "is_one"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", (1,), True),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 64, 8), True),
        ("h.0.attn.bias", (1, 1, 64, 64), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("transformer.h.0.attn.attention.bias", (1, 1, 64, 64), True),
        ("model.layers.0.attn.bias", (32,), False),
        ("model.layers.0.self_attn.q_proj.bias", (32,), False),
        ("model.layers.0.self_attn.q_proj.weight", (32, 32), False),
    ],
)
def test_tables_that_models_compute_are_told_from_weights(
    name: str, shape: tuple[int, ...], is_one: bool
) -> None:
    assert is_buffer(name, shape) == is_one


def test_rotary_frequencies_that_one_model_stores_are_no_weights(tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, "llama", torch.bfloat16, ("base", "math"))
    expected = merged(tmp_path, paths["base"], paths["math"])
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) for i in range(4)}
    shutil.rmtree(tmp_path / "base-math")
    rewrite(paths["base"], lambda tensors: tensors | buffers)
    found = merged(tmp_path, paths["base"], paths["math"])
    assert expected.keys() == found.keys()
    parents = {name: Checkpoint(path) for name, path in paths.items()}
    assert check_compatible(parents, "base") == ()
