"""A merge as a folder: streamed, in shards, refused before it begins; what lies beside the weights; parents
with adapters, towers, other words.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, EvomergeError, RecipeError, SetupError
from evomerge.evaluation import Items
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import checkpoint_writer, merge
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import METHODS
from evomerge.recipes import chat_templates
from evomerge.workers.worker import Worker
from tests.support import architectures
from tests.support.lora_adapters import Q, adapter, looped, pair, tensors_of
from tests.support.merge_cases import assert_equal, candidate, files, live, load_model

Parents = dict[str, Checkpoint]
SHARD = 20_000  # bytes; the largest tensor of the tiny models has 4096


@pytest.fixture
def parents(tiny: dict[str, Path]) -> Parents:
    return {name: Checkpoint(path) for name, path in tiny.items()}


def write_yaml(file: Path, data: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def linear(base: Path | str, *models: Path | str, **more: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {
        "merge_method": "linear",
        "base_model": str(base),
        "parameters": {"weight": 1.0},
        "models": listed,
        **more,
    }  # 1: for the base


def header(file: Path) -> tuple[dict[str, Any], int]:
    """(entries, bytes of data) of a safetensors file, by the format's own words: eight bytes of length, JSON,
    data.
    """
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), len(raw) - 8 - length


# ---- shards


def test_shards_hold_what_one_file_holds(parents: Parents, tmp_path: Path) -> None:
    recipe = candidate("ties")
    checkpoint_writer.write(recipe, parents, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    checkpoint_writer.write_into(merge.Merge(recipe, parents), tmp_path / "parts", shard=SHARD)
    whole, parts = (
        load_file(tmp_path / "whole" / "model.safetensors"),
        sorted((tmp_path / "parts").glob("*.safetensors")),
    )
    assert len(parts) > 3
    assert [part.name for part in parts] == [
        f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)
    ]
    assert_equal(whole, {name: tensor for part in parts for name, tensor in load_file(part).items()})
    assert_equal(load_model(tmp_path / "whole").state_dict(), load_model(tmp_path / "parts").state_dict())
    assert_equal(whole, dict(merge.merged_tensors(recipe, parents)))

    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert index["weight_map"] == {name: part.name for part in parts for name in load_file(part)}
    assert all(sum(t.numel() * t.element_size() for t in load_file(part).values()) <= SHARD for part in parts)
    rest = {name: digest for name, digest in files(tmp_path / "parts").items() if "safetensors" not in name}
    assert rest == {
        name: digest for name, digest in files(tmp_path / "whole").items() if "safetensors" not in name
    }
    parent = Checkpoint(tmp_path / "parts")
    assert_equal({name: parent.tensor(name) for name in parent.tensors}, whole)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(parents: Parents, tmp_path: Path) -> None:
    checkpoint_writer.write_into(merge.Merge(candidate("slerp"), parents), tmp_path, shard=1)
    assert Counter(len(load_file(part)) for part in tmp_path.glob("*.safetensors")) == {
        1: len(parents["base"].tensors)
    }
    assert_equal(load_model(tmp_path).state_dict(), dict(merge.merged_tensors(candidate("slerp"), parents)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_file_is_what_the_format_says_and_its_own_reader_reads(
    dtype: str, parents: Parents, tmp_path: Path
) -> None:
    recipe = replace(candidate("linear"), out_dtype=dtype)
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    entries, data = header(tmp_path / "out" / "model.safetensors")
    assert (len(json.dumps(entries)) > 0, entries.pop("__metadata__")) == (True, {"format": "pt"})
    spans = sorted(entry["data_offsets"] for entry in entries.values())
    assert (spans[0][0], spans[-1][1]) == (0, data)
    assert all(end == start for (_, end), (start, _) in pairwise(spans)), "no gap and no overlap"
    assert int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_equal(
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            dict(merge.merged_tensors(recipe, parents)),
        )


# ---- refused before it begins


def must_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", read)


def test_too_little_memory_is_said_before_anything_is_read_and_leaves_nothing(
    parents: Parents, tmp_path: Path, monkeypatch: Any
) -> None:
    must_not_be_read(monkeypatch)
    for method in ("linear", "slerp", "ties"):
        with pytest.raises(
            SetupError,
            match=r"tensor '[\w.]+' takes .* MB to merge, more than the 0 MB allowed; raise --memory",
        ):
            checkpoint_writer.write(candidate(method), parents, tmp_path / "out", memory=1000)
    assert list(tmp_path.iterdir()) == []


def test_enough_memory_is_that_of_the_largest_tensor(parents: Parents, tmp_path: Path) -> None:
    planned = merge.Merge(candidate("ties"), parents)
    least = max(checkpoint_writer.peak_bytes(planned, step) for step in planned.steps)
    checkpoint_writer.write(candidate("ties"), parents, tmp_path / "out", memory=least)
    with pytest.raises(SetupError):
        checkpoint_writer.write(candidate("ties"), parents, tmp_path / "no", memory=least - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_said_before_anything_is_read_and_leaves_nothing(
    parents: Parents, tmp_path: Path, monkeypatch: Any
) -> None:
    size = sum(2 * torch.Size(info.shape).numel() for info in parents["base"].tensors.values())
    must_not_be_read(monkeypatch)
    monkeypatch.setattr(
        "evomerge.merging.checkpoint_writer.shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1)
    )
    with pytest.raises(
        SetupError, match=r"the merged model takes 0\.0 GB, .* free; make room or choose another disk"
    ):
        checkpoint_writer.write(candidate("linear"), parents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(
        "evomerge.merging.checkpoint_writer.shutil.disk_usage", lambda path: SimpleNamespace(free=size)
    )
    checkpoint_writer.write(candidate("linear"), parents, tmp_path / "out")


def test_shapes_that_do_not_fit_are_found_from_headers_alone(
    parents: Parents, tiny: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(tiny["math"], tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    save_file(
        load_file(file) | {"model.layers.3.mlp.up_proj.weight": torch.zeros(47, 32)},
        file,
        metadata={"format": "pt"},
    )
    must_not_be_read(monkeypatch)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is \[47, 32\] in 'math' and \[48, 32\]"):
        checkpoint_writer.write(
            candidate("linear"), parents | {"math": Checkpoint(tmp_path / "odd")}, tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


# ---- a parent that is broken


class Nothing:
    """An evaluator that never comes to score."""

    def items(self, role: str) -> Items:
        """None."""
        return {}

    def score(self, model: Any, items: Items) -> tuple[tuple[Any, ...], dict[str, float]]:
        """Nothing."""
        raise AssertionError("it was scored")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["float32", "mergekit"])
def test_a_parent_with_nan_fails_the_candidate_and_names_the_tensor(
    method: str, policy: str, parents: Parents, tiny: Any, tmp_path: Path
) -> None:
    if (method, policy) == ("karcher", "mergekit"):
        pytest.skip("mergekit's karcher leaves a model out whose norm is NaN")
    name = "model.layers.2.self_attn.v_proj.weight"
    recipe = replace(candidate(method), policy=policy)
    for model in recipe.models:
        if model == recipe.base:
            continue
        shutil.copytree(tiny[model], tmp_path / model)
        tensors = load_file(tmp_path / model / "model.safetensors")
        tensors[name][3, 5] = float("nan")
        save_file(tensors, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
        parents[model] = Checkpoint(tmp_path / model)
    for attempt in (
        lambda: checkpoint_writer.write(recipe, parents, tmp_path / "out"),
        lambda: merge.merge_into(recipe, parents, live(tiny["base"])),
    ):
        with pytest.raises(CheckpointError, match=rf"^model '\w+' holds NaN in tensor '{name}'"):
            attempt()
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    evaluation = Worker(parents, "base", Nothing(), dtype="bfloat16").evaluate(recipe, {})  # type: ignore[arg-type]
    assert name in str(evaluation.error)


# ---- config


def test_lists_with_an_entry_a_layer_follow_the_layers(tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, "gemma3_text", torch.bfloat16, ("base", "math"))
    types = json.loads((paths["math"] / "config.json").read_text())["layer_types"]
    assert len(set(types)) > 1
    order = [(0, 2), (3, 4), (1, 4)]
    slices = [{"sources": [{"model": str(paths["math"]), "layer_range": list(span)}]} for span in order]
    merge_recipe_file(
        write_yaml(tmp_path / "recipe.yaml", {"merge_method": "passthrough", "slices": slices}),
        tmp_path / "out",
    )
    taken = [i for span in order for i in range(*span)]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [types[i] for i in taken]
    assert config["num_hidden_layers"] == len(taken)
    model, own = load_model(tmp_path / "out"), load_file(paths["math"] / "model.safetensors")
    assert len(model.model.layers) == len(taken)
    for output, layer in enumerate(taken):
        assert torch.equal(
            model.state_dict()[f"model.layers.{output}.mlp.up_proj.weight"],
            own[f"model.layers.{layer}.mlp.up_proj.weight"],
        )


# ---- other forms of a file


@pytest.mark.parametrize("name", ["text_decoder", "default", "anything"])
def test_a_single_module_means_what_the_plain_form_means(
    name: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    plain = linear(tiny["base"], tiny["math"], tiny["code"])
    module = {
        **{k: v for k, v in plain.items() if k != "models"},
        "modules": {name: {"models": plain["models"]}},
    }
    merge_recipe_file(write_yaml(tmp_path / "plain.yaml", plain), tmp_path / "plain")
    merge_recipe_file(write_yaml(tmp_path / "module.yaml", module), tmp_path / "module")
    assert files(tmp_path / "plain") == files(tmp_path / "module")


def test_parameters_of_a_module_come_before_those_of_the_file(tiny: dict[str, Path], tmp_path: Path) -> None:
    models = [{"model": str(tiny[m])} for m in ("math", "code")]
    top = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny["base"]),
        "parameters": {"weight": 0.9, "lambda": 0.5},
    }
    inside = top | {"modules": {"text_decoder": {"models": models, "parameters": {"weight": 0.25}}}}
    merge_recipe_file(write_yaml(tmp_path / "module.yaml", inside), tmp_path / "module")
    merge_recipe_file(
        write_yaml(
            tmp_path / "plain.yaml", top | {"models": models, "parameters": {"weight": 0.25, "lambda": 0.5}}
        ),
        tmp_path / "plain",
    )
    assert_equal(
        load_file(tmp_path / "module" / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_towers_come_from_the_base_and_that_is_said(kind: str, tmp_path: Path) -> None:
    paths = architectures.build(tmp_path, kind, torch.bfloat16, ("base", "math", "code"))
    data = linear(paths["base"], paths["math"], paths["code"])
    module = {
        "text_decoder": {"models": data.pop("models")},
        "vision_tower": {"models": [{"model": str(paths["base"])}]},
    }
    (warning,) = merge_recipe_file(
        write_yaml(tmp_path / "recipe.yaml", data | {"modules": module}), tmp_path / "out"
    )
    own = {name: Checkpoint(path) for name, path in paths.items()}
    towers = own["base"].layout.outer_names("tower")
    assert any("vision" in name for name in towers)
    assert str(len(towers)) in warning
    assert str(paths["base"]) in warning
    assert "unmerged" in warning
    out = Checkpoint(tmp_path / "out")
    assert set(out.tensors) == set(own["base"].tensors)
    for name in out.tensors:
        if name in towers:
            assert torch.equal(out.tensor(name), own["base"].tensor(name)), name
        else:
            weights = {"base": 1.0, "math": 0.5, "code": 0.5}
            mean = sum(w * own[m].tensor(name).double() for m, w in weights.items()) / sum(weights.values())
            torch.testing.assert_close(out.tensor(name).double(), mean, rtol=2**-7, atol=1e-6)
    resident = WeightMap(architectures.load(paths["base"], kind, torch.bfloat16), own["base"].tensors)
    four = own | {"chat": own["code"]}
    listed = dict(merge.merged_tensors(candidate("linear"), four))
    merge.merge_into(candidate("linear"), four, resident)
    resident.verify(lambda name: listed[name])  # the towers were there before
    architectures.load(tmp_path / "out", kind, torch.bfloat16)


def test_an_adapter_in_a_file_is_folded_into_its_base(tiny32: dict[str, Path], tmp_path: Path) -> None:
    tensors = pair(Q)
    lora = adapter(tmp_path / "lora", tensors)
    merge_recipe_file(
        write_yaml(
            tmp_path / "r.yaml",
            linear(tiny32["code"], f"{tiny32['math']}+{lora}", tiny32["code"], dtype="float32"),
        ),
        tmp_path / "out",
    )
    mapping = {"model": {"path": str(tiny32["math"])}, "lora": {"path": str(lora)}}
    data = linear(tiny32["code"], "x", tiny32["code"], dtype="float32")
    data["models"][0]["model"] = mapping
    merge_recipe_file(write_yaml(tmp_path / "m.yaml", data), tmp_path / "mapped")
    assert files(tmp_path / "out") == files(tmp_path / "mapped")
    math, code, out = (
        load_file(path / "model.safetensors") for path in (tiny32["math"], tiny32["code"], tmp_path / "out")
    )
    for name, tensor in out.items():
        own = (
            looped(math[name], *tensors_of(tensors, Q), 2.0) if name == f"{Q}.weight" else math[name].double()
        )
        torch.testing.assert_close(tensor.double(), (own + code[name].double()) / 2, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(out[f"{Q}.weight"], (math[f"{Q}.weight"] + code[f"{Q}.weight"]) / 2, atol=1e-3)


# ---- tokenizers


def add_words(path: Path, to: Path, words: list[str]) -> Path:
    """A copy of a model with further words and rows 1000, 1001, ... for them."""
    from transformers import AutoTokenizer

    shutil.copytree(path, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(to)
    tensors = load_file(to / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.stack([torch.full((32,), 1.0 + i) for i in range(len(words))]).to(tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"vocab_size": len(tensors["lm_head.weight"])}))
    return to


def test_a_union_of_vocabularies_is_a_model_that_knows_all_words(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    math = add_words(tiny["math"], tmp_path / "math", ["newton", "euler"])
    code = add_words(tiny["code"], tmp_path / "code", ["euler", "lambda"])
    file = write_yaml(
        tmp_path / "recipe.yaml", linear(tiny["base"], math, code, tiny["base"], tokenizer_source="union")
    )
    merge_recipe_file(file, tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.get_vocab()) == set(AutoTokenizer.from_pretrained(tiny["base"]).get_vocab()) | {
        "newton",
        "euler",
        "lambda",
    }
    assert model.config.vocab_size == len(tokenizer) == len(model.lm_head.weight) == 67
    rows, own = (
        model.model.embed_tokens.weight,
        load_file(tiny["base"] / "model.safetensors")["model.embed_tokens.weight"],
    )
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("newton", "euler", "lambda", "w7")}
    at = {
        path: load_file(path / "model.safetensors")["model.embed_tokens.weight"].float()
        for path in (math, code)
    }
    torch.testing.assert_close(
        rows[ids["w7"]].float(), (at[math][11] + at[code][11] + own[11].float()) / 3, rtol=2**-7, atol=1e-6
    )
    assert set(rows[ids["newton"]].tolist()) == {1.0}  # of the only model that has it, in every model
    assert set(rows[ids["lambda"]].tolist()) == {2.0}
    assert set(rows[ids["euler"]].tolist()) == {1.5}  # 2 and 1, and their mean where it is lacking
    with torch.no_grad():
        model(tokenizer("w1 newton euler lambda", return_tensors="pt")["input_ids"])


def test_vocabularies_of_different_size_ask_for_a_tokenizer(tiny: dict[str, Path], tmp_path: Path) -> None:
    math = add_words(tiny["math"], tmp_path / "math", ["newton"])
    with pytest.raises(CheckpointError, match="tokenizer_source: union"):
        merge_recipe_file(
            write_yaml(tmp_path / "recipe.yaml", linear(tiny["base"], math, tiny["base"])), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_rows_of_other_words_are_mixed_by_number_with_a_warning(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny["math"], tmp_path / "math")
    text = (tmp_path / "math" / "tokenizer.json").read_text()
    (tmp_path / "math" / "tokenizer.json").write_text(text.replace('"w7"', '"seven"'))
    (warning,) = merge_recipe_file(
        write_yaml(tmp_path / "recipe.yaml", linear(tiny["base"], tmp_path / "math", tiny["base"])),
        tmp_path / "out",
    )
    assert "row 11" in warning
    assert "seven" in warning
    assert (
        merge_recipe_file(
            write_yaml(tmp_path / "recipe.yaml", linear(tiny["base"], tiny["code"], tiny["base"])),
            tmp_path / "same",
        )
        == ()
    )


# ---- chat templates

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
]


def speaks(path: Path, **more: Any) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(path).apply_chat_template(TALK, tokenize=False, **more))


def test_a_template_by_name_is_that_formats_and_by_text_is_the_text(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    wishes = {
        **{name: name for name in chat_templates.KNOWN},
        "own": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    }
    said = {}
    for name, wish in wishes.items():
        file = write_yaml(
            tmp_path / f"{name}.yaml", linear(tiny["base"], tiny["math"], tiny["base"], chat_template=wish)
        )
        merge_recipe_file(file, tmp_path / name)
        said[name] = speaks(tmp_path / name)
        assert load_model(tmp_path / name) is not None
    assert said["own"] == "[S][U][A]"
    assert (
        said["chatml"] == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert (
        speaks(tmp_path / "chatml", add_generation_prompt=True) == said["chatml"] + "<|im_start|>assistant\n"
    )
    assert "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>" in said["llama3"]
    assert "### Instruction:\nU\n\n### Response:\nA" in said["alpaca"]
    assert "[INST] " in said["mistral"]
    assert len(set(said.values())) == len(said)


def with_template(path: Path, to: Path, text: str, *, inside: bool) -> Path:
    shutil.copytree(path, to)
    if inside:
        config = json.loads((to / "tokenizer_config.json").read_text())
        (to / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))
    else:
        (to / "chat_template.jinja").write_text(text)
    return to


def test_auto_takes_the_template_that_most_models_have(tiny: dict[str, Path], tmp_path: Path) -> None:
    one, two = "one {{ messages[0].content }}", "two {{ messages[0].content }}"
    base = with_template(tiny["base"], tmp_path / "base", one, inside=True)
    math, code = (with_template(tiny[m], tmp_path / m, two, inside=m == "code") for m in ("math", "code"))
    for wish, expected in (("auto", "two S"), (None, "one S")):
        more = {"chat_template": wish} if wish else {}
        merge_recipe_file(
            write_yaml(tmp_path / "recipe.yaml", linear(base, math, code, base, **more)), tmp_path / str(wish)
        )
        assert speaks(tmp_path / str(wish)) == expected
    merge_recipe_file(
        write_yaml(tmp_path / "recipe.yaml", linear(tiny["base"], tiny["math"], chat_template="auto")),
        tmp_path / "none",
    )
    assert not (tmp_path / "none" / "chat_template.jinja").exists()


def test_a_name_that_is_no_template_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+:\d+ chat_template must be auto, alpaca"):
        merge_recipe_file(
            write_yaml(tmp_path / "recipe.yaml", linear(tiny["base"], tiny["math"], chat_template="chatm")),
            tmp_path / "out",
        )


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n"])
def test_a_file_without_a_recipe_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(EvomergeError, match=r"recipe\.yaml:\d+:\d+ a recipe is a mapping"):
        merge_recipe_file(tmp_path / "recipe.yaml", tmp_path / "out")
