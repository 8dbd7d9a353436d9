"""What is put by its name on disk lands where transformers' own loader puts it, bit for bit, in every
architecture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.checkpoints.tensor_names import find_towers
from evomerge.errors import CheckpointError
from evomerge.merging import observed_rearrangement
from evomerge.merging.weight_map import WeightMap
from tests.support import architectures

DTYPE = torch.bfloat16
FUSED = {  # a name on disk, the name in memory of what holds it
    "mixtral": (
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
    ),
    "qwen2_moe": ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    "qwen3_moe": ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    "deepseek_v3": ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
}
RENAMED = {
    "gpt2": ("h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
    "gpt_neox": ("embed_out.weight", "lm_head.weight"),
    "llava": ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
    "gemma3": ("language_model.model.norm.weight", "model.language_model.norm.weight"),
    "qwen2_5_vl": ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
}
STACKS = {
    "llava": "language_model.model.layers",
    "gemma3": "language_model.model.layers",
    "qwen2_5_vl": "model.layers",
    "qwen3_vl": "model.language_model.layers",
}


class Folder:
    """Tensors of a model folder by name, read without evomerge."""

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, json.loads((path / "config.json").read_text())
        self.values = {
            name: tensor
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), "BF16", "") for name, tensor in self.values.items()
        }
        self.shapes = {name: info.shape for name, info in self.tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.values.items())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, seed, shards) -> the folder of a base, built once."""
    built: dict[tuple[str, int, str], Folder] = {}

    def base(kind: str, seed: int = 0, shards: str = "") -> Folder:
        key = (kind, seed, shards)
        if key not in built:
            built[key] = Folder(
                architectures.build(tmp_path_factory.mktemp(kind), kind, DTYPE, ("base",), seed, shards)[
                    "base"
                ]
            )
        return built[key]

    return base


def loaded(folder: Folder, kind: str) -> Any:
    return architectures.load(folder.path, kind, DTYPE)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def check_law(kind: str, own: Folder, other: Folder) -> None:
    """A model from `own`, into which every tensor of `other` is put, is the model from `other`."""
    model, wanted = loaded(own, kind), bits(loaded(other, kind))
    objects = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert not all(torch.equal(tensor, wanted[name]) for name, tensor in bits(model).items())
    resident = WeightMap(model, own.tensors)
    resident.verify(own.values.__getitem__)
    for name, tensor in other:
        resident.put(name, tensor)
    resident.verify(other.values.__getitem__)
    assert bits(model).keys() == wanted.keys()
    assert [name for name, tensor in bits(model).items() if not torch.equal(tensor, wanted[name])] == []
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == objects


@pytest.mark.parametrize("kind", architectures.KINDS)
def test_what_is_put_is_what_transformers_loads(zoo: Any, kind: str) -> None:
    check_law(kind, zoo(kind), zoo(kind, 1))


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen3_moe", "llava"])
def test_in_shards(zoo: Any, kind: str) -> None:
    own, other = zoo(kind, 0, "30KB"), zoo(kind, 1, "30KB")
    assert len(list(other.path.glob("*.safetensors"))) > 2
    check_law(kind, own, other)


@pytest.mark.parametrize("kind", FUSED | RENAMED)
def test_disk_and_memory_differ_as_on_the_hub(zoo: Any, kind: str) -> None:
    on_disk, in_memory = (FUSED | RENAMED)[kind]
    folder, model = zoo(kind), loaded(zoo(kind), kind)
    assert on_disk in folder.tensors
    assert in_memory not in folder.tensors
    assert in_memory in bits(model)
    assert on_disk not in bits(model)


@pytest.mark.parametrize("kind", FUSED)
def test_one_expert_alone_changes_nothing_else(zoo: Any, kind: str) -> None:
    name, fused = FUSED[kind]
    model = loaded(zoo(kind), kind)
    before = {key: tensor.clone() for key, tensor in bits(model).items()}
    WeightMap(model, zoo(kind).tensors).put(name, torch.full(zoo(kind).shapes[name], 3.0))
    assert [key for key, tensor in bits(model).items() if not torch.equal(tensor, before[key])] == [fused]
    threes = (bits(model)[fused] == 3).nonzero()
    assert set(threes[:, 0].tolist()) == {2}
    assert len(threes) == torch.Size(zoo(kind).shapes[name]).numel()


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3"])
def test_tied_stays_tied(zoo: Any, kind: str) -> None:
    model = loaded(zoo(kind), kind)
    resident = WeightMap(model, zoo(kind).tensors)
    for name, tensor in zoo(kind, 1):
        resident.put(name, tensor)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_on_disk_too(zoo: Any, tmp_path: Path, same: bool) -> None:
    table = zoo("qwen3").values["model.embed_tokens.weight"]
    model = loaded(with_tensors(zoo("qwen3"), tmp_path / "own", {"lm_head.weight": table.clone()}), "qwen3")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = zoo("qwen3", 1).values["model.embed_tokens.weight"] * (1 if same else 2)
    other = with_tensors(zoo("qwen3", 1), tmp_path / "other", {"lm_head.weight": head})
    resident = WeightMap(model, other.tensors)
    for name, tensor in other:
        resident.put(name, tensor)
    wanted = bits(loaded(other, "qwen3"))
    assert [name for name, tensor in bits(model).items() if not torch.equal(tensor, wanted[name])] == []


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("gpt2", ".attn.bias"),
        ("gpt_neox", ".attention.bias"),
        ("gpt_neox", ".attention.masked_bias"),
        ("gpt_neox", "rotary_emb.inv_freq"),
    ],
)
def test_what_transformers_ignores_is_ignored(zoo: Any, kind: str, ending: str) -> None:
    model, folder = loaded(zoo(kind), kind), zoo(kind)
    resident = WeightMap(model, folder.tensors)
    found = [name for name in resident.ignored if name.endswith(ending)]
    assert len(found) == architectures.LAYERS
    before = {key: tensor.clone() for key, tensor in bits(model).items()}
    resident.put(found[0], folder.values[found[0]])
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(model).items())


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "llava"])
def test_a_tensor_with_no_place(zoo: Any, kind: str) -> None:
    model, tensors = loaded(zoo(kind), kind), zoo(kind).tensors
    extra = {"model.layers.0.mlp.experts.0.extra.weight": TensorInfo((2, 2), "BF16", "")}
    with pytest.raises(
        CheckpointError, match=r"ForC\w+ has no place for 'model.layers.0.mlp.experts.0.extra.weight'"
    ):
        WeightMap(model, tensors | extra)
    resident = WeightMap(model, tensors)
    with pytest.raises(CheckpointError, match="has no place for 'extra'"):
        resident.put("extra", torch.zeros(2))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("llama", "model.norm.weight", "no tensor on disk feeds 'model.norm.weight' of LlamaForCausalLM"),
        ("llama", "lm_head.weight", "no tensor on disk feeds 'lm_head.weight' of LlamaForCausalLM"),
        (
            "qwen3",
            "model.embed_tokens.weight",
            r"no tensor on disk feeds .*'model.embed_tokens.weight'.* of Qwen3ForCausalLM",
        ),
        (
            "deepseek_v3",
            "model.layers.2.mlp.gate.e_score_correction_bias",
            "feeds 'model.layers.2.mlp.gate.e_score_correction_bias'",
        ),
        (
            "qwen2_5_vl",
            "visual.merger.ln_q.weight",
            "feeds 'model.visual.merger.ln_q.weight' of Qwen2_5_VLForConditionalGeneration",
        ),
        (
            "qwen3_moe",
            "model.layers.2.mlp.experts.3.up_proj.weight",
            "cannot make 'model.layers.2.mlp.experts.gate_up_proj' of .* and 4 more",
        ),
        (
            "qwen3_moe",
            "model.layers.2.mlp.experts.3.down_proj.weight",
            r"down_proj' is \[4, 32, 16\] in memory, .* on disk give \[3, 32, 16\]",
        ),
    ],
)
def test_a_tensor_that_is_missing(zoo: Any, kind: str, name: str, message: str) -> None:
    tensors = {key: info for key, info in zoo(kind).tensors.items() if key != name}
    assert len(tensors) < len(zoo(kind).tensors)
    with pytest.raises(CheckpointError, match=message):
        WeightMap(loaded(zoo(kind), kind), tensors)


def test_shapes_must_agree(zoo: Any) -> None:
    model, tensors = loaded(zoo("llama"), "llama"), zoo("llama").tensors
    with pytest.raises(
        CheckpointError,
        match=r"'model.norm.weight' is \[32\] in memory, 'model.norm.weight' on disk give \[1\]",
    ):
        WeightMap(model, tensors | {"model.norm.weight": TensorInfo((1,), "BF16", "")})
    resident = WeightMap(model, tensors)
    with pytest.raises(
        CheckpointError, match=r"'model.norm.weight' is \[1\], its place in memory takes \[32\]"
    ):
        resident.put("model.norm.weight", torch.zeros(1))


def test_two_names_for_one_parameter(zoo: Any) -> None:
    tensors = zoo("llama").tensors
    with pytest.raises(
        CheckpointError,
        match=r"'model.norm.weight' and 'norm.weight' on disk both become 'model.norm.weight'",
    ):
        WeightMap(loaded(zoo("llama"), "llama"), tensors | {"norm.weight": tensors["model.norm.weight"]})


def test_verify_names_what_is_elsewhere(zoo: Any) -> None:
    folder = zoo("qwen3_moe")
    name = "model.layers.3.mlp.experts.1.down_proj.weight"
    resident = WeightMap(loaded(folder, "qwen3_moe"), folder.tensors)
    with pytest.raises(CheckpointError, match=f"'{name}' on disk is not what"):
        resident.verify(lambda key: folder.values[key] + (key == name))


def test_on_another_type_than_disk(zoo: Any) -> None:
    """A resident of float32 takes tensors of bfloat16, as transformers' loader does."""
    folder = zoo("mixtral", 1)
    model = architectures.load(zoo("mixtral").path, "mixtral", torch.float32)
    resident = WeightMap(model, folder.tensors)
    for name, tensor in folder:
        resident.put(name, tensor)
    wanted = bits(architectures.load(folder.path, "mixtral", torch.float32))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in bits(model).items())


REARRANGEMENTS = {  # functions of two tensors [4, 6]
    "stack": lambda a, b: {"x": torch.stack([a, b])},
    "stack and transpose": lambda a, b: {"x": torch.stack([b, a]).transpose(0, 2).contiguous()},
    "rows": lambda a, b: {"x": torch.cat([a, b])},
    "columns": lambda a, b: {"x": torch.cat([a, b.clone()], dim=1)},
    "interleaved": lambda a, b: {"x": torch.stack([a, b], dim=2).view(4, 12)},
    "two targets": lambda a, b: {"y": b.T.contiguous(), "x": a[None]},
}
OTHERS = {
    "sum": lambda a, b: {"x": a + b},
    "one lost": lambda a, b: {"x": a},
    "scaled": lambda a, b: {"x": torch.cat([a, b * 2])},
    "flipped": lambda a, b: {"x": torch.cat([a.flip(0), b])},
    "twice": lambda a, b: {"x": torch.cat([a, b, b])},
    "a row moved": lambda a, b: {"x": torch.cat([a[[0, 1, 3, 2]], b])},
    "split": lambda a, b: {"x": torch.cat([a[:2], b]), "y": a[2:]},
    "swapped": lambda a, b: {"x": torch.cat([torch.cat([a[:3], b[3:]]), torch.cat([b[:3], a[3:]])])},
}


@pytest.mark.parametrize("bits_a_pass", [31, 3])
@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_a_rearrangement_is_observed(monkeypatch: pytest.MonkeyPatch, name: str, bits_a_pass: int) -> None:
    monkeypatch.setattr(observed_rearrangement, "_DIGIT", bits_a_pass)
    rearrange, sources = REARRANGEMENTS[name], [torch.randn(4, 6), torch.randn(4, 6)]
    wanted = rearrange(*sources)
    learned = observed_rearrangement.observe(
        lambda tensors: rearrange(*tensors), [(4, 6), (4, 6)], list(wanted)
    )
    assert learned is not None
    filled = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted.values()]
    for source, part in zip(sources, learned, strict=True):
        filled[part.target].as_strided((4, 6), part.strides, part.offset).copy_(source)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(filled, wanted.values(), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rearrangement_by_strides_is_refused(name: str) -> None:
    rearrange = OTHERS[name]
    targets = list(rearrange(torch.zeros(4, 6), torch.zeros(4, 6)))
    assert (
        observed_rearrangement.observe(lambda tensors: rearrange(*tensors), [(4, 6), (4, 6)], targets) is None
    )


def test_an_architecture_that_mixes_tensors_is_refused(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import MergeModulelist

    honest = MergeModulelist.convert
    monkeypatch.setattr(
        MergeModulelist, "convert", lambda *a, **k: {key: value * 2 for key, value in honest(*a, **k).items()}
    )
    with pytest.raises(
        CheckpointError, match=r"' of Qwen3MoeForCausalLM is not a plain rearrangement of 'model.layers.0"
    ):
        WeightMap(loaded(zoo("qwen3_moe"), "qwen3_moe"), zoo("qwen3_moe").tensors)


def test_one_tensor_that_becomes_several(zoo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with fused projections, read by a rule that splits them and turns them over."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    def fused(folder: Folder) -> Folder:
        values = dict(folder.values)
        for layer in range(architectures.LAYERS):
            pair = [values.pop(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up")]
            values[f"model.layers.{layer}.mlp.pair.weight"] = torch.cat(pair).T.contiguous()
        path = with_tensors(folder, tmp_path / folder.path.parent.name, {}).path
        save_file(values, path / "model.safetensors", metadata={"format": "pt"})
        return Folder(path)

    rule = WeightConverter(
        "mlp.pair.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Transpose(0, 1), Chunk(dim=0)]
    )
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [rule])
    check_law("llama", fused(zoo("llama")), fused(zoo("llama", 1)))


@pytest.mark.parametrize("kind", architectures.KINDS)
def test_the_language_tower_is_found_among_the_names(zoo: Any, kind: str) -> None:
    """Against the model itself: the language tower's layers, and the modules that are not the language
    model's.
    """
    folder, model = zoo(kind), loaded(zoo(kind), kind)
    found = find_towers(folder.shapes, folder.config)
    assert found is not None
    decoder = getattr(model.base_model, "language_model", model.base_model)
    layers = getattr(decoder, "layers", None) or decoder.h
    own = {
        id(p)
        for p in (*decoder.state_dict(keep_vars=True).values(), *model.get_output_embeddings().parameters())
    }
    resident = WeightMap(model, folder.tensors)
    in_stack = {id(p) for p in layers.state_dict(keep_vars=True).values()}
    for name in folder.tensors:
        if name not in resident.ignored:
            slot = id(resident._parameters[resident._places[name].parameter])
            assert name.startswith(found.stack + ".") == (slot in in_stack), name
            assert (name in found.others) == (slot not in own), name
    assert bool(found.others) == (kind in architectures.VISION)
    assert found.stack == STACKS.get(kind, found.stack)


@pytest.mark.parametrize("kind", architectures.VISION)
def test_the_language_tower_is_found_when_the_config_leaves_out_defaults_or_is_flat(
    zoo: Any, kind: str
) -> None:
    folder = zoo(kind)
    wanted = find_towers(folder.shapes, folder.config)
    text, vision = folder.config["text_config"], folder.config["vision_config"]
    assert (
        find_towers(
            folder.shapes, {"text_config": {"vocab_size": text["vocab_size"]}, "vision_config": vision}
        )
        == wanted
    )
    assert find_towers(folder.shapes, {**text, "vision_config": vision}) == wanted
    twin = {
        name: tuple(32 if size == 24 else size for size in shape) for name, shape in folder.shapes.items()
    }
    assert find_towers(twin, folder.config) == wanted  # as wide as the language tower, too


def test_the_language_tower_is_found_with_layers_beyond_the_depth_and_none_at_all(zoo: Any) -> None:
    folder = zoo("deepseek_v3")
    beyond = {
        name.replace("layers.3.", "layers.4."): shape
        for name, shape in folder.shapes.items()
        if ".layers.3." in name
    }
    found = find_towers(folder.shapes | beyond, folder.config)
    assert found is not None
    assert (found.stack, found.others) == ("model.layers", ())
    assert find_towers(folder.shapes, {**folder.config, "num_hidden_layers": 9}) is None


def test_the_same_arguments_give_the_same_bits(tmp_path: Path) -> None:
    first, second = (
        architectures.build(tmp_path / name, "qwen3_moe", DTYPE, ("base", "math")) for name in "ab"
    )
    for name, path in first.items():
        assert (path / "model.safetensors").read_bytes() == (second[name] / "model.safetensors").read_bytes()
    with (
        safe_open(first["base"] / "model.safetensors", "pt") as base,
        safe_open(first["math"] / "model.safetensors", "pt") as math,
    ):
        assert all(not torch.equal(base.get_tensor(name), math.get_tensor(name)) for name in base.keys())  # noqa: SIM118


def with_tensors(folder: Folder, path: Path, extra: dict[str, torch.Tensor]) -> Folder:
    """A copy of a folder that holds more tensors."""
    path.mkdir()
    (path / "config.json").write_text((folder.path / "config.json").read_text())
    save_file(folder.values | extra, path / "model.safetensors", metadata={"format": "pt"})
    return Folder(path)
