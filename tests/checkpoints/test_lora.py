"""LoRA adapters folded into a base, against float64 loops; what is refused; and references. peft is asked in
test_lora_peft.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, check_compatible, equal_tensors, open_parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.checkpoints.reference import split_reference
from evomerge.errors import CheckpointError, ConfigError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import merge
from evomerge.recipes import Mix, Recipe, params
from tests.support.lora_adapters import (
    DOWN,
    EMBEDDING,
    HEAD,
    PREFIX,
    SHAPES,
    Q,
    V,
    adapter,
    embedding,
    looped,
    noise,
    pair,
    tensors_of,
)
from tests.support.tiny_models import build


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=4e-6)


@pytest.fixture(scope="module")
def base(tiny32: dict[str, Path]) -> Checkpoint:
    return Checkpoint(tiny32["base"])


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"lora_alpha": 1}, (0.25, 0.25)),
        ({"alpha_pattern": {"q_proj": 2}}, (0.5, 2.0)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}}, (0.5, 2.0)),
        ({"alpha_pattern": {r".*\.0\..*": 20, "proj": 3}}, (2.0, 5.0)),
        ({"alpha_pattern": {"q_pro": 2, "q_proj_": 2, "elf_attn.q_proj": 2}}, (2.0, 2.0)),
        ({"r": 9, "rank_pattern": {"[qv]_proj": 4}, "use_rslora": True}, (4.0, 4.0)),
    ],
)
def test_a_tensor_is_the_base_plus_the_product(
    settings: dict[str, Any], scales: tuple[float, ...], base: Checkpoint, tmp_path: Path
) -> None:
    tensors = pair(Q) | pair(V, seed=2)
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors, **settings))
    for module, scale in zip((Q, V), scales, strict=True):
        expected = looped(base.tensor(f"{module}.weight"), *tensors_of(tensors, module), scale)
        near(parent.tensor(f"{module}.weight"), expected)
    assert parent.changed == (f"{V}.weight", f"{Q}.weight")
    for name in base.tensors:
        assert name in parent.changed or torch.equal(parent.tensor(name), base.tensor(name))


def test_a_rank_of_its_own_is_read_from_the_pattern(base: Checkpoint, tmp_path: Path) -> None:
    tensors = pair(Q, 2) | pair(V, 4, seed=2)
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors, rank_pattern={"q_proj": 2}))
    expected = looped(base.tensor(f"{Q}.weight"), *tensors_of(tensors, Q), 8 / 2)
    near(parent.tensor(f"{Q}.weight"), expected)


def test_embeddings_are_folded_transposed(base: Checkpoint, tmp_path: Path) -> None:
    tensors = embedding()
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors))
    expected = looped(base.tensor(f"{EMBEDDING}.weight"), *tensors.values(), 2.0, transposed=True)
    near(parent.tensor(f"{EMBEDDING}.weight"), expected)


def test_a_module_saved_whole_replaces_the_bases(base: Checkpoint, tmp_path: Path) -> None:
    head = noise(*SHAPES[HEAD], seed=3)
    folder = adapter(
        tmp_path / "lora", pair(Q) | {f"{PREFIX}{HEAD}.weight": head}, modules_to_save=["lm_head"]
    )
    assert torch.equal(AdaptedCheckpoint(base, folder).tensor("lm_head.weight"), head)


def test_an_embedding_saved_with_its_adapter_is_replaced_and_then_changed(
    base: Checkpoint, tmp_path: Path
) -> None:
    tensors, start = embedding(), noise(*SHAPES[EMBEDDING], seed=4)
    parent = AdaptedCheckpoint(
        base, adapter(tmp_path / "lora", tensors | {f"{PREFIX}{EMBEDDING}.base_layer.weight": start})
    )
    expected = looped(start, *tensors.values(), 2.0, transposed=True)
    near(parent.tensor(f"{EMBEDDING}.weight"), expected)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_is_rounded_once_to_the_bases_type(
    given: torch.dtype, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Rounded from float32: never further from the exact sum than half a step of bfloat16, and a little."""
    base = Checkpoint(tiny["base"])
    tensors = {name: tensor.to(given) for name, tensor in pair(Q).items()}
    found = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors)).tensor(f"{Q}.weight")
    exact = looped(base.tensor(f"{Q}.weight"), *tensors_of(tensors, Q), 2.0)
    step = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= 0.5 * step + 1e-6).all())


def gpt2(folder: Path, *, prefix: str = "transformer.", width: int = 8) -> Path:
    """A folder with the names and shapes of GPT-2: weights [in, out], biases, no head of its own."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (20, width),
        "wpe.weight": (16, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(2):
        for name, (rows, columns) in {
            "attn.c_attn": (1, 3),
            "attn.c_proj": (1, 1),
            "mlp.c_fc": (1, 4),
            "mlp.c_proj": (4, 1),
        }.items():
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = (
                (rows * width, columns * width),
                (columns * width,),
            )
    save_file(
        {prefix + name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": width}))
    return folder


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_proj"])
def test_weights_that_keep_inputs_first_are_changed_transposed(
    name: str, prefix: str, flag: bool, tmp_path: Path
) -> None:
    """The square attn.c_proj too, whatever the adapter's fan_in_fan_out says; and for names without
    'transformer.'.
    """
    base = Checkpoint(gpt2(tmp_path / "base", prefix=prefix))
    module = f"transformer.h.1.{name}"
    columns, rows = base.tensors[f"{prefix}h.1.{name}.weight"].shape
    tensors = pair(module, shape=(rows, columns))
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors, fan_in_fan_out=flag))
    expected = looped(
        base.tensor(f"{prefix}h.1.{name}.weight"), *tensors_of(tensors, module), 2.0, transposed=True
    )
    near(parent.tensor(f"{prefix}h.1.{name}.weight"), expected)


def test_biases_saved_with_the_adapter_replace_the_bases(tmp_path: Path) -> None:
    base = Checkpoint(gpt2(tmp_path / "base"))
    bias = noise(24, seed=9)
    tensors = pair("transformer.h.0.attn.c_attn", shape=(24, 8)) | {
        f"{PREFIX}transformer.h.0.attn.c_attn.bias": bias
    }
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors, bias="lora_only"))
    assert torch.equal(parent.tensor("transformer.h.0.attn.c_attn.bias"), bias)
    assert len(parent.changed) == 2


# ---- a parent like any other


def test_an_adapted_parent_names_its_tensors_as_its_base_does(base: Checkpoint, tmp_path: Path) -> None:
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", pair(Q)))
    for field in ("path", "config", "tensors", "layout"):
        assert getattr(parent, field) == getattr(base, field)
    assert parent.layout.place(f"{Q}.weight") == base.layout.place(f"{Q}.weight")
    assert parent.layout.layer_name(2, "x") == base.layout.layer_name(2, "x")
    assert parent.layout.layer_suffixes(1) == base.layout.layer_suffixes(1)
    assert parent.layout.outer_names("head") == base.layout.outer_names("head")
    assert (
        set(base.tensors) - set(equal_tensors(parent, base))
        == set(parent.changed)
        == set(base.tensors) - set(equal_tensors(base, parent))
    )
    check_compatible({"base": base, "lora": parent}, "base")
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        parent.tensor("nothing")


def test_reading_leaves_the_base_as_it_is(base: Checkpoint, tmp_path: Path) -> None:
    before = base.content_hash()
    parent = AdaptedCheckpoint(base, adapter(tmp_path / "lora", pair(Q) | embedding()))
    first = {name: parent.tensor(name) for name in parent.tensors}
    for name, tensor in first.items():
        assert torch.equal(tensor, parent.tensor(name))
    assert all(
        torch.equal(base.tensor(name), tensor)
        for name, tensor in load_file(base.path / "model.safetensors").items()
    )
    assert base.content_hash() == before


def test_the_hash_follows_what_changes_the_weights_and_nothing_else(
    base: Checkpoint, tiny: dict[str, Path], tmp_path: Path
) -> None:
    plain = AdaptedCheckpoint(base, adapter(tmp_path / "plain", pair(Q))).content_hash()
    same = adapter(
        tmp_path / "same",
        pair(Q),
        base_model_name_or_path="elsewhere",
        lora_dropout=0.1,
        alpha_pattern={"k_proj": 3},
    )
    assert AdaptedCheckpoint(base, same).content_hash() == plain
    others = [
        AdaptedCheckpoint(base, adapter(tmp_path / "alpha", pair(Q), lora_alpha=9)),
        AdaptedCheckpoint(base, adapter(tmp_path / "stable", pair(Q), use_rslora=True)),
        AdaptedCheckpoint(base, adapter(tmp_path / "values", pair(Q, seed=5))),
        AdaptedCheckpoint(Checkpoint(tiny["base"]), tmp_path / "plain"),
    ]
    assert len({plain, base.content_hash(), *(other.content_hash() for other in others)}) == 6


def test_a_merge_reads_it_as_the_model_it_stands_for(
    base: Checkpoint, tiny32: dict[str, Path], tmp_path: Path
) -> None:
    lora = AdaptedCheckpoint(base, adapter(tmp_path / "lora", pair(Q) | pair(DOWN) | embedding()))
    whole = tmp_path / "whole"
    shutil.copytree(base.path, whole)
    save_file(
        {name: lora.tensor(name) for name in lora.tensors},
        whole / "model.safetensors",
        metadata={"format": "pt"},
    )
    given = params({"weight": (0.4, 0.7)})
    outer = Mix("task_arithmetic", (("lora", None), ("math", None)), ("base", None), given)
    layers = tuple(Mix("task_arithmetic", (("lora", i), ("math", i)), ("base", i), given) for i in range(4))
    recipe = Recipe("base", layers, outer, outer, dtype="float32", out_dtype="float32")
    rest = {"base": base, "math": Checkpoint(tiny32["math"])}
    ours = dict(merge.merged_tensors(recipe, {**rest, "lora": lora}))
    theirs = dict(merge.merged_tensors(recipe, {**rest, "lora": Checkpoint(whole)}))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- refusals


def test_a_tied_embedding_that_was_trained_apart_is_refused_and_one_with_lora_is_not(tmp_path: Path) -> None:
    base = Checkpoint(build(tmp_path / "tied", torch.float32, ("base",), tied=True)["base"])
    assert AdaptedCheckpoint(base, adapter(tmp_path / "lora", embedding())).changed == (
        f"{EMBEDDING}.weight",
    )
    whole = {f"{PREFIX}{EMBEDDING}.weight": noise(*SHAPES[EMBEDDING])}
    with pytest.raises(CheckpointError, match="shares with its head"):
        AdaptedCheckpoint(base, adapter(tmp_path / "saved", whole, modules_to_save=["embed_tokens"]))


TIED_HEADS: dict[str, dict[str, torch.Tensor]] = {
    "lora": pair(HEAD),
    "lora and the embeddings": pair(HEAD) | embedding(),
    "saved": {f"{PREFIX}{HEAD}.weight": noise(*SHAPES[HEAD], seed=3)},
    "both saved": {
        f"{PREFIX}{HEAD}.weight": noise(*SHAPES[HEAD], seed=3),
        f"{PREFIX}{EMBEDDING}.weight": noise(*SHAPES[EMBEDDING], seed=4),
    },
    "dora": pair(HEAD) | {f"{PREFIX}{HEAD}.lora_magnitude_vector": noise(64).abs()},
    # what peft saves of a trained embedding: the head beside it, as it was
    "the embeddings, and the head as it was": embedding(),
}


@pytest.mark.parametrize("case", TIED_HEADS)
def test_a_head_trained_on_a_tied_base_becomes_one_of_its_own(case: str, tmp_path: Path) -> None:
    """The merged folder computes what base and adapter do where the head is trained apart."""
    folder = build(tmp_path / "tied", torch.float32, ("base",), tied=True)["base"]
    base = Checkpoint(folder)
    start = base.tensor(f"{EMBEDDING}.weight")
    given = dict(TIED_HEADS[case])
    if "as it was" in case:
        given |= {f"{PREFIX}{EMBEDDING}.base_layer.weight": start, f"{PREFIX}{HEAD}.weight": start.clone()}
    settings = {"modules_to_save": ["lm_head", "embed_tokens"]} if "saved" in case else {}
    lora = adapter(tmp_path / "lora", given, use_dora=case == "dora", **settings)
    parent = AdaptedCheckpoint(base, lora)
    assert parent.config["tie_word_embeddings"] is False
    assert parent.layout.outer_names("head") == ("lm_head.weight", "model.norm.weight")
    assert base.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in base.tensors

    def trained(module: str) -> torch.Tensor:
        saved = given.get(f"{PREFIX}{module}.weight", start)
        a = given.get(f"{PREFIX}{module}.lora_A.weight", given.get(f"{PREFIX}{module}.lora_embedding_A"))
        b = given.get(f"{PREFIX}{module}.lora_B.weight", given.get(f"{PREFIX}{module}.lora_embedding_B"))
        if a is None or b is None:
            return saved.double()
        changed = looped(saved, a, b, 2.0, transposed=module == EMBEDDING)
        return (
            scaled(changed, given[f"{PREFIX}{module}.lora_magnitude_vector"]) if case == "dora" else changed
        )

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {folder}+{lora}}}]\ndtype: float32\n")
    merge_recipe_file(recipe, tmp_path / "out")
    merged = Checkpoint(tmp_path / "out")
    near(merged.tensor("lm_head.weight"), trained(HEAD))
    near(merged.tensor(f"{EMBEDDING}.weight"), trained(EMBEDDING))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        near(model(ids).logits, hidden.double() @ trained(HEAD).T)


def test_a_head_trained_on_a_bare_tied_decoder_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = Checkpoint(gpt2(tmp_path / "base", prefix=""))
    with pytest.raises(CheckpointError, match="none of its own but shares its embeddings"):
        AdaptedCheckpoint(base, adapter(tmp_path / "head", pair(HEAD, shape=(20, 8))))
    whole = AdaptedCheckpoint(
        Checkpoint(gpt2(tmp_path / "whole")), adapter(tmp_path / "lora", pair(HEAD, shape=(20, 8)))
    )
    assert whole.tensors["lm_head.weight"].shape == (20, 8)


# ---- DoRA


def scaled(weight: torch.Tensor, lengths: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """Each output's weights scaled to its length, in float64, one output at a time."""
    out = weight.double().clone()
    for i, length in enumerate(lengths.tolist()):
        row = out[:, i] if transposed else out[i]
        row *= length / math.sqrt(math.fsum(x * x for x in row.tolist()))
    return out


@pytest.mark.parametrize("ending", ["", ".weight"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 1}])
def test_rows_have_the_lengths_that_dora_trained(
    settings: dict[str, Any], ending: str, base: Checkpoint, tmp_path: Path
) -> None:
    factor = {"use_rslora": 4.0, "lora_alpha": 0.25}.get(next(iter(settings), ""), 2.0)
    tensors = pair(Q) | pair(V, seed=2) | embedding()
    lengths = {Q: noise(32, seed=5), V: noise(16, seed=6), EMBEDDING: noise(32, seed=7)}
    named = {f"{PREFIX}{m}.lora_magnitude_vector{ending}": length for m, length in lengths.items()}
    folder = adapter(tmp_path / "lora", tensors | named, use_dora=True, **settings)
    parent = AdaptedCheckpoint(base, folder)
    for module in (Q, V):
        changed = looped(base.tensor(f"{module}.weight"), *tensors_of(tensors, module), factor)
        near(parent.tensor(f"{module}.weight"), scaled(changed, lengths[module]))
        assert parent.low_rank(f"{module}.weight") is None
    changed = looped(base.tensor(f"{EMBEDDING}.weight"), *embedding().values(), factor, transposed=True)
    near(parent.tensor(f"{EMBEDDING}.weight"), scaled(changed, lengths[EMBEDDING], transposed=True))


def test_weights_that_keep_inputs_first_are_scaled_by_column(tmp_path: Path) -> None:
    base = Checkpoint(gpt2(tmp_path / "base"))
    module = "transformer.h.0.attn.c_proj"
    tensors, lengths = pair(module, shape=(8, 8)), noise(8, seed=4)
    folder = adapter(
        tmp_path / "lora", tensors | {f"{PREFIX}{module}.lora_magnitude_vector": lengths}, use_dora=True
    )
    changed = looped(base.tensor(f"{module}.weight"), *tensors_of(tensors, module), 2.0, transposed=True)
    near(
        AdaptedCheckpoint(base, folder).tensor(f"{module}.weight"), scaled(changed, lengths, transposed=True)
    )


def test_a_row_of_zeros_has_no_direction_and_stays(tmp_path: Path, base: Checkpoint) -> None:
    tensors = {name: torch.zeros_like(t) for name, t in pair(HEAD).items()}
    whole = {f"{PREFIX}{HEAD}.base_layer.weight": torch.zeros(64, 32)}
    lengths = {f"{PREFIX}{HEAD}.lora_magnitude_vector": torch.ones(64)}
    folder = adapter(tmp_path / "lora", tensors | whole | lengths, use_dora=True)
    assert not AdaptedCheckpoint(base, folder).tensor(f"{HEAD}.weight").any()


def test_lengths_that_are_too_few_are_refused(tmp_path: Path, base: Checkpoint) -> None:
    tensors = pair(V) | {f"{PREFIX}{V}.lora_magnitude_vector": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"is \[32\], expected is one number for each of the 16"):
        AdaptedCheckpoint(base, adapter(tmp_path / "lora", tensors, use_dora=True))


def test_the_hash_of_an_adapter_without_dora_is_that_of_earlier_versions(
    tmp_path: Path, base: Checkpoint
) -> None:
    """A study knows its parents by it."""
    folder = adapter(tmp_path / "lora", pair(Q))
    names = [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"]
    changes = [[f"{Q}.weight", None, *names, 2.0, False]]
    digest = hashlib.sha256((base.content_hash() + json.dumps(changes)).encode())
    digest.update(hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).digest())
    assert AdaptedCheckpoint(base, folder).content_hash() == digest.hexdigest()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora without magnitudes": ({"use_dora": True}, "without its lora_magnitude_vector"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "alora": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "other type": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "init is a number": ({"init_lora_weights": 1}, "init_lora_weights"),
    "bias": ({"bias": "some"}, "bias must be"),
    "bias is a list": ({"bias": ["none"]}, "bias must be"),
    "r is text": ({"r": "4"}, "r must be a positive number"),
    "r is zero": ({"r": 0}, "r must be a positive number"),
    "r is huge": ({"r": 10**400}, "r must be a positive number"),
    "alpha is nan": ({"lora_alpha": math.nan}, "lora_alpha must be a positive number"),
    "alpha is a list": ({"lora_alpha": [8]}, "lora_alpha must be a positive number"),
    "other rank": ({"r": 8}, "the rank 8, its tensors have 4"),
    "other rank in pattern": ({"rank_pattern": {"q_proj": 3}}, "the rank 3, its tensors have 4"),
    "pattern is a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
    "pattern is no expression": ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    "pattern's value": ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern must be a positive number"),
    "modules": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_is_more_than_lora_is_refused(name: str, base: Checkpoint, tmp_path: Path) -> None:
    settings, said = REFUSED[name]
    folder = adapter(tmp_path / "lora", pair(Q), **settings)
    with pytest.raises(CheckpointError, match=said) as error:
        AdaptedCheckpoint(base, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


STRAY: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "unknown module": (pair("model.layers.9.self_attn.q_proj", shape=(32, 32)), "matches no tensor of base"),
    "unknown whole": ({PREFIX + "score.weight": noise(2, 32)}, "matches no tensor of base"),
    "magnitude": (pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": noise(32)}, "does not set use_dora"),
    "A alone": ({f"{PREFIX}{Q}.lora_A.weight": noise(4, 32)}, "without its 'lora_B.weight'"),
    "B alone": ({f"{PREFIX}{Q}.lora_B.weight": noise(32, 4)}, "matches no tensor of base"),
    "ranks differ": ({f"{PREFIX}{Q}.lora_A.weight": noise(4, 32), f"{PREFIX}{Q}.lora_B.weight": noise(32, 3)},
        r"A \[4, 32\] and B \[32, 3\]"),
    "wide": (pair(Q, shape=(32, 48)), r"is \[32, 32\]"),
    "vector": ({f"{PREFIX}{Q}.lora_A.weight": noise(4), f"{PREFIX}{Q}.lora_B.weight": noise(32)}, r"A \[4\]"),
    "norm": (pair("model.norm", shape=(32, 1)), r"is \[32\]"),
    "rank nought": (pair(Q, 0), r"A \[0, 32\]"),
    "whole of another shape": ({f"{PREFIX}{HEAD}.weight": noise(65, 32)},
        r"is \[65, 32\], 'lm_head.weight' of base .* is \[64, 32\]"),
    "embedding the other way": (
        {f"{PREFIX}{EMBEDDING}.lora_embedding_A": noise(4, 32),
            f"{PREFIX}{EMBEDDING}.lora_embedding_B": noise(64, 4)}, r"A \[4, 32\]"
    ),
    "whole twice": ({f"{PREFIX}{HEAD}.weight": noise(64, 32),
        f"{PREFIX}{HEAD}.base_layer.weight": noise(64, 32)}, "has both"),
    "one tensor by two names": (pair(Q) | pair(Q.removeprefix("model."), shape=(32, 32)),
        "changes 'model.layers.1.self_attn.q_proj.weight' twice"),
    "integers": ({f"{PREFIX}{HEAD}.weight": torch.ones(64, 32, dtype=torch.int32)}, "as I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRAY)
def test_a_tensor_that_does_not_fit_the_base_is_refused(name: str, base: Checkpoint, tmp_path: Path) -> None:
    tensors, said = STRAY[name]
    folder = adapter(tmp_path / "lora", tensors)
    with pytest.raises(CheckpointError, match=said) as error:
        AdaptedCheckpoint(base, folder)
    assert str(folder) in str(error.value)


def test_files_that_are_missing_or_pickled_are_said(base: Checkpoint, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", pair(Q))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle; load it with peft"):
        AdaptedCheckpoint(base, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be opened"):
        AdaptedCheckpoint(base, folder)
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json is missing; give the folder of a LoRA adapter"
    ):
        AdaptedCheckpoint(base, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"lora is a LoRA adapter: name it with its base, as base\+lora"
    ):
        Checkpoint(folder)


# ---- references


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("org/model", ("org/model", None, None, None)),
        ("org/model@v1", ("org/model", "v1", None, None)),
        ("org/model+org/lora", ("org/model", None, "org/lora", None)),
        ("org/model@v1+org/lora@refs/pr/2", ("org/model", "v1", "org/lora", "refs/pr/2")),
        ("/a/b@c", ("/a/b@c", None, None, None)),
        ("/a/b+./l@r", ("/a/b", None, "./l@r", None)),
        ("model+lora@x", ("model", None, "lora", "x")),
    ],
)
def test_a_reference_is_split_as_mergekit_writes_it(reference: str, parts: tuple[str | None, ...]) -> None:
    assert split_reference(reference) == parts


def test_a_folder_that_exists_wins_over_signs_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c@d", "e", "f+g@h"):
        (tmp_path / name).mkdir()
    assert split_reference("a+b") == ("a+b", None, None, None)
    assert split_reference("c@d") == ("c@d", None, None, None)
    assert split_reference("a+b+e") == ("a+b", None, "e", None)
    assert split_reference("e+a+b") == ("e", None, "a+b", None)
    assert split_reference(f"{tmp_path}/a+b+{tmp_path}/c@d") == (
        f"{tmp_path}/a+b",
        None,
        f"{tmp_path}/c@d",
        None,
    )
    assert split_reference("f+g@h+org/lora@v2") == ("f+g@h", None, "org/lora", "v2")
    assert split_reference("org/x@1+a+b") == ("org/x", "1", "a+b", None)


@pytest.mark.parametrize(
    "reference",
    [
        "a+b+c",
        "+lora",
        "model+",
        "+",
        "a++b",
        "/no/where+x+y",
        "",
        "@",
        "@v1",
        "org/model@",
        "org/model+@v1",
        "org/model+l@",
        "a\n+b+",
    ],
)
def test_a_reference_that_can_be_split_in_no_way_or_in_two_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match="is no model reference"):
        split_reference(reference)


def test_a_parent_is_opened_by_its_reference(tiny32: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", pair(Q))
    assert isinstance(open_parent(str(tiny32["base"])), Checkpoint)
    parent = open_parent(f"{tiny32['base']}+{folder}")
    assert isinstance(parent, AdaptedCheckpoint)
    assert parent.changed == (f"{Q}.weight",)
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_parent(f"{tiny32['base']}+{tmp_path}/nowhere")
