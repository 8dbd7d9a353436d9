"""mergekit 0.1.5 on the YAML and shell of a route gives the checkpoint of the route; what it silently drops
is noticed.

All files but those with stages go through one mergekit process, because starting one takes longer than
everything else here."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from evomerge.checkpoints import Checkpoint
from evomerge.errors import RecipeError, SetupError
from evomerge.export import reload_check, route_checkpoint, route_mergekit
from evomerge.merging import checkpoint_writer, mergekit_check, model_loading
from evomerge.merging.routing.routed_model import Hop, RoutedModel, gains
from evomerge.recipes import Mix, Recipe, params
from tests.support import parity_cases, shipped_routes
from tests.support.shipped_routes import ROUTE, SIX, Case
from tests.support.sweeps import sweep
from tests.support.toy import REPO

ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
LOSING = ("qwen2_moe", "granitemoe")  # mergekit 0.1.5 writes these without their experts and ends well


@dataclass(frozen=True)
class Made:
    """ours: the checkpoint; theirs: what mergekit made; answers: of the live route."""

    ours: Path
    theirs: Path
    answers: dict[str, torch.Tensor]


def write(case: Case, into: Path) -> None:
    """Checkpoint 'out', 'recipe.yaml' and its shell."""
    (into / "out").mkdir(parents=True)
    route_checkpoint.write_checkpoint_files(case.routed, case.hops, into / "out", case.donor)
    route_mergekit.write_shell(case.routed, case.hops, into / "shell", case.donor)
    named = {name: str(file.path) for name, file in case.files.items()}
    (into / "recipe.yaml").write_text(
        route_mergekit.yaml_document(case.recipe, case.hops, case.files, named, shell=str(into / "shell"))
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, str], Made]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("routes")
    out, jobs = {}, []
    for kind, dtype in [*((kind, "float32") for kind in (*SIX, *LOSING)), ("gemma2", "bfloat16")]:
        opened = shipped_routes.files(root / f"{kind} {dtype}", kind, dtype)
        for scaled in (False, True) if kind in SIX else (False,):
            case = shipped_routes.case(opened, scaled, dtype)
            into = root / f"{kind} {dtype} {scaled}"
            write(case, into)
            answers = reload_check.check_outputs(
                case.routed.model, reload_check.check_inputs(case.routed.model)
            )
            out[kind, scaled, dtype] = Made(into / "out", into / "mergekit", answers)
            jobs.append((into / "recipe.yaml", into / "mergekit"))
    assert parity_cases.finish(parity_cases.start(jobs)) == {}, "mergekit ends well, always"
    return out


@pytest.mark.parametrize(
    ("kind", "scaled", "dtype"),
    [*((k, s, "float32") for k in SIX for s in (False, True)), ("gemma2", True, "bfloat16")],
)
def test_mergekit_makes_the_same_model(
    kind: str, scaled: bool, dtype: str, made: dict[tuple[str, bool, str], Made]
) -> None:
    found = made[kind, scaled, dtype]
    loaded = model_loading.load_model(found.theirs, dtype)
    assert loaded.faults == ()
    apart = route_checkpoint.compare_outputs(
        found.answers, reload_check.check_outputs(loaded.model, reload_check.check_inputs(loaded.model))
    )
    assert max(apart.logits, apart.steps) < (1e-4 if dtype == "float32" else 0.03), apart
    tensors = route_mergekit.compare_checkpoints(found.ours, found.theirs)
    assert tensors.only == ()
    assert tensors.tensors > 30
    assert (tensors.unequal if not scaled else tensors.further) == 0, tensors


@pytest.mark.parametrize("kind", LOSING)
def test_what_mergekit_drops_without_a_word_is_noticed(
    kind: str, made: dict[tuple[str, bool, str], Made]
) -> None:
    found = made[kind, False, "float32"]
    tensors = route_mergekit.compare_checkpoints(found.ours, found.theirs)
    assert not tensors.agrees
    assert any("layers.3." in name and name.endswith("is missing") for name in tensors.only), tensors.only
    assert kind not in route_mergekit.VERIFIED


def test_the_file_says_no_more_than_it_has_to(tmp_path: Path) -> None:
    """Layers that follow each other are one slice, unless they have a gain."""
    opened = shipped_routes.files(tmp_path, "llama", "float32")
    case = shipped_routes.case(opened, scaled=False)
    text = route_mergekit.yaml_document(
        case.recipe, case.hops, opened, {"base": "org/base", "math": "org/math@main"}, header=["a", "b\nc"]
    )
    assert text.startswith("# a\n# b\n# c\n")
    document = yaml.safe_load(text)
    slices = document.pop("slices")
    assert document == {
        "merge_method": "passthrough",
        "base_model": "./shell",
        "dtype": "float32",
        "out_dtype": "float32",
    }
    flat = [(s["model"], *s["layer_range"]) for entry in slices for s in entry["sources"]]
    base, math = "org/base", "org/math@main"
    assert flat == [(base, 0, 0), (base, 0, 1), (math, 1, 3), (math, 1, 2), (base, 2, 4), (base, 0, 0)]
    scaled = shipped_routes.case(opened)
    document = yaml.safe_load(
        route_mergekit.yaml_document(scaled.recipe, scaled.hops, opened, {"base": base, "math": math})
    )
    assert [entry["sources"][0]["layer_range"] for entry in document["slices"]] == [
        [0, 0],
        *([i, i + 1] for _, i in ROUTE),
        [0, 0],
    ]
    gain = 1 / (1.0 * 0.7 * 1.3)
    wanted = [
        {"filter": f".{name}.weight", "value": pytest.approx(gain, rel=1e-15)}
        for name in ("mlp.down_proj", "self_attn.o_proj")
    ]
    assert document["slices"][3]["sources"][0]["parameters"]["scale"] == wanted


def test_embeddings_and_head_may_be_of_other_models_than_the_layers_beside_them(tmp_path: Path) -> None:
    opened = shipped_routes.files(tmp_path, "llama", "float32")
    case = shipped_routes.case(opened, scaled=False)
    recipe = replace(
        case.recipe,
        embeddings=Mix("passthrough", (("math", None),)),
        head=Mix("passthrough", (("math", None),)),
    )
    document = yaml.safe_load(
        route_mergekit.yaml_document(recipe, case.hops, opened, {"base": "b", "math": "m"})
    )
    ends = [document["slices"][i]["sources"][0] for i in (0, -1)]
    assert ends == [{"model": "m", "layer_range": [0, 0]}] * 2


# ---- a merge and a route


def staged(opened: dict[str, Checkpoint], into: Path, scaled: bool, dtype: str, policy: str) -> Case:
    """A linear merge, and a route over it and a parent."""

    def half(layer: int | None) -> Mix:
        return Mix(
            "linear",
            (("base", layer), ("math", layer)),
            None,
            params({"weight": (0.3, 0.6), "normalize": 1.0}),
        )

    merge = Recipe(
        "base",
        tuple(half(i) for i in range(opened["base"].layout.num_layers)),
        half(None),
        half(None),
        out_dtype=dtype,
        policy=policy,
    )
    checkpoint_writer.write(merge, opened, into)
    files = {"merged": Checkpoint(into), "math": opened["math"]}
    models = {name: model_loading.load_base(file, dtype) for name, file in files.items()}
    route = [({"base": "merged"}.get(model, model), layer) for model, layer in ROUTE]
    outer = Mix("passthrough", (("merged", None),))
    layers = tuple(Mix("passthrough", (source,)) for source in route)
    scales = shipped_routes.SCALES if scaled else ()
    recipe = Recipe("base", layers, outer, outer, out_dtype=dtype, stages=(("merged", merge),), scales=scales)
    hops = tuple(
        Hop(models[m], layer, gain) for (m, layer), gain in zip(route, gains(scales, len(route)), strict=True)
    )
    return Case(recipe, RoutedModel(models["merged"]), hops, opened, models)


@pytest.mark.parametrize(
    ("kind", "scaled", "dtype", "policy"),
    sweep(
        [("gemma2", True, "float32", "mergekit"), ("qwen3", False, "bfloat16", "mergekit")],
        [],
    ),
)
def test_a_merge_and_a_route_over_it_are_two_documents_for_mergekit_multi(
    kind: str, scaled: bool, dtype: str, policy: str, tmp_path: Path
) -> None:
    """In Gemma 2, layers of the merge lie in the shell with their gains. The YAML names its shell by where it
    lies itself."""
    case = staged(shipped_routes.files(tmp_path, kind, dtype), tmp_path / "stage", scaled, dtype, policy)
    into = tmp_path / "route"
    write(case, into)
    named = {name: str(file.path) for name, file in case.files.items()}
    (into / "recipe.yaml").write_text(route_mergekit.yaml_document(case.recipe, case.hops, case.files, named))
    first, second = yaml.safe_load_all((into / "recipe.yaml").read_text())
    assert (first["name"], first["merge_method"], second["merge_method"], "name" in second) == (
        "merged",
        "linear",
        "passthrough",
        False,
    )
    assert bool(route_mergekit.shell_positions(case.hops)) == (kind == "gemma2")
    found = route_mergekit.check_with_mergekit(ENVIRONMENT, into / "recipe.yaml", into / "out")
    assert found.agrees, found
    assert found.unequal == 0, found
    assert found.tensors > 60
    assert sorted(path.name for path in into.iterdir()) == ["out", "recipe.yaml", "shell"]


# ---- what is not written


def test_a_sentence_says_why_there_is_no_file() -> None:
    recipe = shipped_routes.recipe()
    assert {route_mergekit.refusal(recipe, kind) for kind in SIX} == {None}
    assert set(SIX) == set(route_mergekit.VERIFIED)
    assert "verified for gemma2, llama, mixtral, olmo2, phi3, qwen3 and not for qwen2_moe" in str(
        route_mergekit.refusal(recipe, "qwen2_moe")
    )
    mixed = replace(
        recipe, layers=(*recipe.layers[:2], Mix("linear", (("base", 2), ("math", 2))), *recipe.layers[3:])
    )
    assert "layer 2 is mixed while others pass through" in str(route_mergekit.refusal(mixed, "llama"))
    with pytest.raises(RecipeError, match="layer 2 is mixed while others pass through"):
        route_mergekit.yaml_document(mixed, (), {}, {})


def test_mergekit_that_fails_or_is_missing_is_an_error_that_says_so(tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\n")
    with pytest.raises(SetupError, match="make_mergekit_env"):
        mergekit_check.find_program(recipe, tmp_path)
    program = tmp_path / "env" / "bin" / "mergekit-yaml"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\npwd >&2\necho "of frames: $1" >&2\nexit 1\n')
    program.chmod(0o755)
    assert mergekit_check.find_program(recipe, tmp_path / "env") == program
    with pytest.raises(SetupError, match=r"mergekit failed on .*recipe.yaml: of frames: recipe.yaml"):
        mergekit_check.run_mergekit(program, recipe, out, in_own_folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "recipe.yaml"]
