"""A route shipped as a checkpoint computes what was scored, in a process that knows nothing of it; a folder
that does not is caught.

The process itself is started for two cases (`FRESH`); the others run its program in this one, which takes a
tenth of the time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from evomerge import reports
from evomerge.checkpoints import Checkpoint, stored_dtype
from evomerge.errors import CandidateError, NothingToExport, SetupError
from evomerge.evaluation import Evaluation, ItemScore
from evomerge.export import candidate, open_route, reload_check, route_checkpoint
from evomerge.merging import atomic_folder, checkpoint_writer, companion_files, merge, model_loading
from evomerge.merging.model_loading import load_base
from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from evomerge.merging.weight_map import WeightMap
from evomerge.recipes import Mix, Recipe, params
from evomerge.store import NewTrial, Store, StudyFacts
from tests.support import shipped_routes
from tests.support.shipped_routes import ROUTE, SCALES, SIX, Case
from tests.support.sweeps import sweep


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


FRESH = {"llama", "there is no config"}


@pytest.fixture(autouse=True)
def program_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `evomerge.export.reload_check` in this process, but for the parameters in `FRESH`."""
    call = getattr(request.node, "callspec", None)
    if call is None or not FRESH & set(call.params.values()):
        monkeypatch.setattr(route_checkpoint, "subprocess", SimpleNamespace(run=run_here))


def run_here(program: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` returns of the program."""
    assert program[:4] == [sys.executable, "-P", "-m", "evomerge.export.reload_check"]
    try:
        reload_check.main(program[4:])
    except Exception as error:
        return subprocess.CompletedProcess(program, 1, "", f"{type(error).__name__}: {error}")
    return subprocess.CompletedProcess(program, 0, "", "")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return shipped_routes.case(shipped_routes.files(tmp_path_factory.mktemp("llama"), "llama", "float32"))


def general(names: Any) -> set[str]:
    """Names of tensors without their layers."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}


# ---- a folder that is right


@pytest.mark.parametrize("kind", sweep([*SIX, "gemma3"], ("llama", "mixtral")))
def test_a_fresh_process_computes_what_was_scored(kind: str, tmp_path: Path) -> None:
    case = shipped_routes.case(shipped_routes.files(tmp_path, kind, "float32"))
    found = route_checkpoint.write_checkpoint(case.routed, case.hops, tmp_path / "out", case.donor)
    assert found.logits == 0, found
    assert found.steps < 2e-6, found  # kernels round by where in memory a tensor lies
    assert found.tokens
    written = Checkpoint(tmp_path / "out")
    assert written.layout.num_layers == len(ROUTE)
    if kind != "gemma3":  # which is on the hub under names that transformers no longer writes
        assert general(written.tensors) == general(case.files["base"].tensors)
    kept = {file.name for file in case.donor.iterdir()}
    assert {file.name for file in written.path.iterdir()} == kept
    settings = [
        json.loads((place / "tokenizer_config.json").read_text()) for place in (written.path, case.donor)
    ]
    names = [own.pop("tokenizer_class") for own in settings]  # one that transformers 4 knows, too
    assert settings[0] == settings[1], names
    for name in kept - {"config.json", "model.safetensors", "tokenizer_config.json"}:
        assert (written.path / name).read_bytes() == (case.donor / name).read_bytes()


@pytest.mark.parametrize("kind", ["gemma2"])
def test_in_bfloat16_the_weights_are_the_same_and_logits_differ_by_rounding_at_most(
    kind: str, tmp_path: Path
) -> None:
    case = shipped_routes.case(shipped_routes.files(tmp_path, kind, "bfloat16"), dtype="bfloat16")
    found = route_checkpoint.write_checkpoint(case.routed, case.hops, tmp_path / "out", case.donor)
    assert max(found.logits, found.steps) < 0.03, found
    assert stored_dtype(Checkpoint(tmp_path / "out")) == "bfloat16"


@pytest.mark.parametrize("kind", SIX)
def test_the_folder_scales_the_hidden_state_that_enters_each_layer(kind: str, tmp_path: Path) -> None:
    """Against the definition: the route without scales, its stream multiplied as it enters each layer. No
    norm has an epsilon of effect, which alone sees the difference."""
    opened = shipped_routes.files(tmp_path, kind, "float32")
    for scaled in (False, True):
        case = shipped_routes.case(opened, scaled)
        (tmp_path / str(scaled)).mkdir()
        route_checkpoint.write_checkpoint_files(case.routed, case.hops, tmp_path / str(scaled), case.donor)
    shipped, plain = (
        model_loading.load_model(tmp_path / str(scaled), "float32").model for scaled in (True, False)
    )
    asked = reload_check.check_inputs(plain)
    for model in (shipped, plain):
        for norm in [m for m in model.modules() if "norm" in type(m).__name__.lower()]:
            found_eps = [name for name in ("variance_epsilon", "eps") if hasattr(norm, name)]
            assert found_eps
            setattr(norm, found_eps[0], 1e-20)  # 0 would make NaN of what padding adds

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=asked["ids"], attention_mask=asked["mask"]).logits[
                asked["mask"].bool()
            ]
        return found.double()

    unscaled = logits(plain)
    for layer, scale in zip(stack(plain)[1], SCALES, strict=True):
        layer.register_forward_pre_hook(times(scale), with_kwargs=True)
    hooked, found = logits(plain), logits(shipped)
    assert float((hooked - found).abs().max() / hooked.std()) < 2e-5
    assert float((hooked - unscaled).abs().max() / hooked.std()) > 0.01, "the scales are of effect"


def times(scale: float) -> Callable[..., Any]:
    def hook(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (arguments[0] * scale, *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"] * scale}

    return hook


def test_words_that_are_asked_have_no_meaning_in_the_config(tmp_path: Path) -> None:
    case = shipped_routes.case(shipped_routes.files(tmp_path, "gemma3", "float32"))
    asked = reload_check.check_inputs(case.routed.model)
    assert {0, 1, 2, 5} <= set(asked["banned"].tolist()), "padding, begin, end, and the image's place"
    assert not set(asked["ids"].flatten().tolist()) & set(asked["banned"].tolist())
    assert len(asked["ids"].unique()) > 12
    assert set(reload_check.check_outputs(case.routed.model, asked)["tokens"].flatten().tolist()).isdisjoint(
        {1, 2, 5}
    )


# ---- a folder that is wrong


def lose(path: Path) -> None:
    change(path, lambda tensors: tensors.pop("model.layers.4.mlp.up_proj.weight"))


def nudge(path: Path) -> None:
    """One element of one tensor by one unit in the last place."""
    change(
        path,
        lambda tensors: tensors["model.layers.4.mlp.up_proj.weight"].view(torch.int32).view(-1)[7].add_(1),
    )


def change(path: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    how(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def rotate(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 9000.0
    (path / "config.json").write_text(json.dumps(config))


def empty(path: Path) -> None:
    (path / "config.json").unlink()


DAMAGE = {
    "a tensor is lost": (lose, r"1 tensors of .*: model.layers.4.mlp.up_proj.weight is missing"),
    "an element is one unit off": (
        nudge,
        r"1 tensors of out are not those that were scored, such as model.layers.4.mlp.up_proj.weight",
    ),
    "the config rotates otherwise": (
        rotate,
        r"computes something else: logits differ by up to \S+ "
        r"and step logits by up to \S+ of their deviation",
    ),
    "there is no config": (empty, r"out cannot be used in a process of its own: .*CheckpointError"),
}


@pytest.mark.parametrize("case_", DAMAGE)
def test_a_damaged_folder_is_caught(case_: str, llama: Case, tmp_path: Path) -> None:
    damage, message = DAMAGE[case_]
    out = tmp_path / "out"
    out.mkdir()
    route_checkpoint.write_checkpoint_files(llama.routed, llama.hops, out, llama.donor)
    damage(out)
    with pytest.raises(NothingToExport, match=message):
        route_checkpoint.verify_checkpoint(out, llama.routed)


def test_what_fails_the_proof_leaves_no_folder(llama: Case, tmp_path: Path) -> None:
    """The live model computes something that its weights and config do not say."""
    routed = RoutedModel(llama.models["base"])
    handle = routed.model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: logits * 1.01
    )  # type: ignore[operator]
    with pytest.raises(NothingToExport, match="has the weights that were scored and computes something else"):
        route_checkpoint.write_checkpoint(routed, llama.hops, tmp_path / "out", llama.donor)
    handle.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_route_that_no_config_can_say_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Every second layer of the model has experts; the route asks for two such layers in a row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    routed = RoutedModel(model)
    with pytest.raises(NothingToExport, match=r"the route is no plain checkpoint: .*layer 1"):
        route_checkpoint.write_checkpoint(
            routed, [Hop(model, layer) for layer in (0, 0, 1, 1)], tmp_path / "out", tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="exists; choose another folder"):
        route_checkpoint.write_checkpoint(llama.routed, llama.hops, tmp_path, llama.donor)


def test_what_was_tied_stays_tied_unless_its_values_differ(tmp_path: Path) -> None:
    """A head of its own under a config that ties it would be lost when the folder is loaded."""
    case = shipped_routes.case(shipped_routes.files(tmp_path, "qwen3", "float32"))
    live: Any = case.routed.model
    tied = route_checkpoint.plain_model(case.routed)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    live.get_output_embeddings().weight = nn.Parameter(
        live.get_input_embeddings().weight * 1.5, requires_grad=False
    )
    found = route_checkpoint.write_checkpoint(case.routed, case.hops, tmp_path / "out", case.donor)
    assert found.tokens
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in Checkpoint(tmp_path / "out").tensors


def test_files_of_a_processor_and_a_chat_template_come_along(llama: Case, tmp_path: Path) -> None:
    donor = tmp_path / "donor"
    donor.mkdir()
    names = ("preprocessor_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json")
    for name in names:
        (donor / name).write_text('{"from": "the donor"}')
    (donor / "model.safetensors").write_text("not copied")
    with atomic_folder.new_folder(tmp_path / "out") as staging:
        companion_files.copy_companion_files(donor, staging)
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(names)


# ---- what is a route, the same wherever it is asked


class Stored:
    """A study over the tiny models that has scored its base and one candidate."""

    def __init__(self, folder: Path, files: dict[str, Path], recipe: Recipe) -> None:
        self.parents = {name: Checkpoint(path) for name, path in files.items()}
        facts = {
            "parents": {name: {"path": str(path), "revision": None} for name, path in files.items()},
            "tasks": {"task": ""},
        }
        base = stacked(*(("base", layer) for layer in range(4)))
        with Store.open(folder / "study.db", write=True) as store:
            store.begin("routes", 0, "study: routes\n", {}, StudyFacts.from_json(facts))
            for generation, (origin, of) in enumerate((("parent", base), ("sampled", recipe))):
                found = Evaluation(of.id, (ItemScore("task", "item", 0.5),), {"task": 0.5}, {})
                trial = store.add_trial(
                    NewTrial(
                        generation=generation,
                        slot=0,
                        origin=origin,
                        label=None,
                        genome=None,
                        parents=(),
                        recipe=of,
                        items={"task": ("item",)},
                        evaluation=found,
                        score=0.5,
                        reported=0.5,
                    )
                )
            self.shown = reports.candidate(store, trial)["route"]
            candidate.export_candidate(store, trial, self.parents, folder / "out")
        self.card = (folder / "out" / "README.md").read_text()


def stacked(*layers: tuple[str, int], base: str = "base", **more: Any) -> Recipe:
    outer = Mix("passthrough", ((base, None),))
    return Recipe(base, tuple(Mix("passthrough", (source,)) for source in layers), outer, outer, **more)


def test_a_model_cut_to_its_first_layers_is_shown_as_the_route_that_is_exported(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    found = Stored(tmp_path, tiny, stacked(("math", 0), ("math", 1)))
    assert found.shown == "math 0-1"
    assert "Route: math 0-1." in found.card


def test_a_merge_of_two_documents_gets_no_route_on_its_card(tiny: dict[str, Path], tmp_path: Path) -> None:
    half = [
        Mix("linear", (("base", layer), ("math", layer)), None, params({"weight": (0.5, 0.5)}))
        for layer in (0, 1, 2, 3, None)
    ]
    merged = Recipe("base", tuple(half[:4]), half[4], half[4])
    stages = (("merged", merged),)
    found = Stored(tmp_path, tiny, stacked(*(("merged", layer) for layer in range(4)), stages=stages))
    assert found.shown is None
    assert "Route:" not in found.card
    own = stacked(*(("merged", layer) for layer in range(4)), base="merged", stages=stages)
    assert not own.is_route({})
    assert stacked(("merged", 0), base="merged", stages=stages).is_route({}), (
        "a stage's depth is its recipe's"
    )


# ---- one config for a stack, whichever way it is written


def edit(path: Path, **changed: Any) -> None:
    """Changes keys of a config.json; None takes a key out."""
    config = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


F, S = "full_attention", "sliding_attention"
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "layer types that differ": (
        "gemma3_text",
        {"layer_types": [S, S, F, S]},
        {"layer_types": [F, S, S, F]},
        {"layer_types": [S, S, S, S, F, S]},
    ),
    "layer types that only the class knows": (
        "gemma2",
        {"layer_types": None},
        {"layer_types": [F, S, S, F]},
        {"layer_types": [S, S, S, S, S, F]},
    ),
    "sets of layers": ("qwen3_moe", {"decoder_sparse_step": 1}, {}, {"mlp_only_layers": []}),
    "a count of leading layers": ("deepseek_v3", {}, {}, {"first_k_dense_replace": 1}),
}


def both_ways(
    recipe: Recipe, files: dict[str, Checkpoint], folder_: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a recipe written by a merge, and by the export of routes: what transformers reads of
    each."""
    from transformers import AutoConfig

    checkpoint_writer.write(recipe, files, folder_ / "merged")
    live = open_route.load_route(recipe, files)
    (folder_ / "routed").mkdir()
    route_checkpoint.write_checkpoint_files(live.routed, live.view.hops, folder_ / "routed", live.donor)
    first, second = (AutoConfig.from_pretrained(folder_ / name).to_dict() for name in ("merged", "routed"))
    return first | {"_name_or_path": ""}, second | {"_name_or_path": ""}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stack_has_one_config_whether_it_is_merged_or_exported_as_a_route(
    name: str, tmp_path: Path
) -> None:
    kind, base, math, expected = CONFIGS[name]
    opened = shipped_routes.files(tmp_path, kind, "float32")
    edit(opened["base"].path, **base)
    edit(opened["math"].path, **math)
    files = {model: Checkpoint(file.path) for model, file in opened.items()}
    merged, routed = both_ways(shipped_routes.recipe(scaled=False, dtype="float32"), files, tmp_path)
    assert merged == routed
    assert merged["num_hidden_layers"] == len(ROUTE)
    assert {key: merged[key] for key in expected} == expected


def test_layers_in_place_of_a_model_with_other_types_compute_with_their_own(tmp_path: Path) -> None:
    """Such a recipe is no route, yet the base's config would be wrong for it, also where it is scored."""
    opened = shipped_routes.files(tmp_path, "gemma3_text", "float32")
    edit(opened["math"].path, layer_types=[F, S, S, F])
    files = {model: Checkpoint(file.path) for model, file in opened.items()}
    recipe = stacked(("math", 0), ("base", 1), ("base", 2), ("math", 3), out_dtype="float32")
    assert not recipe.is_route({"base": 4})
    merged, routed = both_ways(recipe, files, tmp_path)
    assert merged == routed
    assert merged["layer_types"][0] == F
    own = files["base"].config["layer_types"]
    assert merged["layer_types"] == [F, *own[1:3], F]
    skeleton = WeightMap(load_base(files["base"], "float32"), files["base"].tensors)
    with pytest.raises(CandidateError, match="say other things of its layers than the base's"):
        merge.merge_into(recipe, files, skeleton)
