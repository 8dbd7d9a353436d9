"""One code path: into a live model, to disk, as an iterator; and what happens when a merge fails."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CandidateError, CheckpointError, EvomergeError, RecipeError, SetupError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import checkpoint_writer, merge, tensor_plan
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import METHODS
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import STORED, Filtered, Mix, Recipe, params
from tests.support.merge_cases import assert_equal, candidate, files, live, load_model
from tests.support.tiny_models import build

MODELS = ("math", "code", "chat")


def stack(*sources: tuple[str, int], values: dict | None = None, outer: str = "math", **fields) -> Recipe:
    """Layers passed through; `values` are parameters of all of them."""
    given = params(values or {})
    ends = Mix("passthrough", ((outer, None),))
    return Recipe("base", tuple(Mix("passthrough", (s,), None, given) for s in sources), ends, ends, **fields)


def average(weights: tuple, values: dict | None = None, **fields) -> Recipe:
    """A linear merge of the first models with the same numbers everywhere."""
    sources = MODELS[: len(weights)]
    given = params({"weight": weights, "normalize": 0.0, **(values or {})})
    layers = tuple(Mix("linear", tuple((m, i) for m in sources), None, given) for i in range(4))
    ends = Mix("linear", tuple((m, None) for m in sources), None, given)
    return Recipe("base", layers, ends, ends, **fields)


@pytest.fixture
def parents(tiny: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint(path) for name, path in tiny.items()}


@pytest.fixture
def resident(tiny: dict[str, Path]) -> WeightMap:
    return live(tiny["base"])


# ---- one code path


ARITHMETIC = {
    "float32": {},
    "mergekit": {"policy": "mergekit"},
    "mergekit in the inputs' type": {"policy": "mergekit", "dtype": STORED},
    "mergekit in bfloat16": {"policy": "mergekit", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_what_is_scored_is_what_is_shipped(method, arithmetic, parents, resident, tmp_path, tiny):
    before = {name: files(path) for name, path in tiny.items()}
    recipe = replace(candidate(method), **ARITHMETIC[arithmetic])
    listed = dict(merge.merged_tensors(recipe, parents))
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    merge.merge_into(recipe, parents, resident)
    assert_equal(listed, load_file(tmp_path / "out" / "model.safetensors"))
    assert_equal(listed, resident.model.state_dict())
    assert_equal(listed, load_model(tmp_path / "out").state_dict())
    assert {name: files(path) for name, path in tiny.items()} == before, "a parent's file was written to"


@pytest.mark.parametrize("method", METHODS)
def test_what_a_search_scores_with_tables_is_what_is_shipped_without(method, parents, resident, tmp_path):
    known = MagnitudeTables(build=True)
    for seed in range(4):  # the first candidates build what the later ones use
        recipe = candidate(method, seed)
        merge.merge_into(recipe, parents, resident, known)
        checkpoint_writer.write(recipe, parents, tmp_path / str(seed))
        assert_equal(resident.model.state_dict(), load_file(tmp_path / str(seed) / "model.safetensors"))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m != "model_stock"]
)  # which takes short task vectors for unrelated ones
def test_policies_differ_by_rounding_alone_or_by_a_fault_that_is_written_down(method, parents):
    """In float32 from float32 inputs both policies mean the same sum, but for the order of operations and
    mergekit's faults.
    """
    recipe = candidate(method, out_dtype="float32")
    ours, theirs = (
        dict(merge.merged_tensors(r, parents)) for r in (recipe, replace(recipe, policy="mergekit"))
    )
    same = sum(int(torch.isclose(ours[n], theirs[n], rtol=1e-4, atol=1e-6).sum()) for n in ours)
    assert same >= 0.97 * sum(t.numel() for t in ours.values())


def test_tensors_of_the_parents_stay_as_they_are_in_memory(parents):
    seen = {n: {t: p.tensor(t) for t in p.tensors} for n, p in parents.items()}
    copies = {n: {t: x.clone() for t, x in of.items()} for n, of in seen.items()}
    for method in METHODS:
        for _, tensor in merge.merged_tensors(replace(candidate(method), out_dtype="float32"), parents):
            tensor.zero_()
        for _, tensor in merge.merged_tensors(candidate(method), parents):
            tensor.zero_()
    for name in seen:
        assert_equal(seen[name], copies[name])


def test_a_second_merge_leaves_no_trace_of_the_first(parents, resident):
    parameters = {name: id(p) for name, p in resident.model.named_parameters()}
    places = {name: p.data_ptr() for name, p in resident.model.named_parameters()}
    merge.merge_into(candidate("dare_ties", 1), parents, resident)
    merge.merge_into(candidate("linear", 2), parents, resident)
    assert_equal(resident.model.state_dict(), dict(merge.merged_tensors(candidate("linear", 2), parents)))
    assert {name: id(p) for name, p in resident.model.named_parameters()} == parameters
    assert {name: p.data_ptr() for name, p in resident.model.named_parameters()} == places


def test_a_merge_does_not_depend_on_the_global_generator_or_on_what_came_before(parents):
    recipe = candidate("dare_linear")
    torch.manual_seed(1)
    first = dict(merge.merged_tensors(recipe, parents))
    torch.manual_seed(2)
    list(merge.merged_tensors(candidate("dare_linear", 3), parents))
    assert_equal(first, dict(merge.merged_tensors(recipe, parents)))


def test_tensors_come_in_order_embeddings_layers_head(parents):
    names = [name for name, _ in merge.merged_tensors(candidate("linear"), parents)]
    layers = [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]
    assert names[0] == "model.embed_tokens.weight"
    assert sorted(names[-2:]) == ["lm_head.weight", "model.norm.weight"]
    assert layers == sorted(layers)
    assert len(names) == len(set(names)) == len(parents["base"].tensors)


def test_parents_in_shards_merge_as_parents_in_one_file(parents, tiny, tmp_path):
    model = load_model(tiny["math"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded = parents | {"math": Checkpoint(tmp_path / "sharded")}
    assert_equal(
        dict(merge.merged_tensors(candidate("ties"), parents)),
        dict(merge.merged_tensors(candidate("ties"), sharded)),
    )


# ---- what a recipe means


def test_a_layer_passed_through_is_the_parents_tensor(parents):
    recipe = stack(("math", 3), ("code", 0), ("chat", 1), ("base", 1), ("math", 3), outer="code")
    out = dict(merge.merged_tensors(recipe, parents))
    for name, tensor in out.items():
        place = parents["base"].layout.place(name)
        model, layer = ("code", None) if place.layer is None else recipe.layers[place.layer].sources[0]
        assert torch.equal(
            tensor, parents[model].tensor(name if layer is None else f"model.layers.{layer}.{place.suffix}")
        ), name


def test_filters_of_a_model_see_its_own_layer_and_filters_of_the_merge_that_of_the_output(parents):
    scale = Filtered((("layers.3.", 2.0), ("*", 1.0)))
    out = dict(
        merge.merged_tensors(
            stack(
                ("math", 3),
                ("math", 0),
                ("math", 1),
                ("math", 2),
                values={"scale": (scale,)},
                out_dtype="float32",
            ),
            parents,
        )
    )
    for output, layer in enumerate((3, 0, 1, 2)):
        want = parents["math"].tensor(f"model.layers.{layer}.mlp.up_proj.weight").float() * (
            2.0 if layer == 3 else 1.0
        )
        assert torch.equal(out[f"model.layers.{output}.mlp.up_proj.weight"], want)

    share = Filtered((("layers.3.", 0.0), ("lm_head", 0.0), ("*", 1.0)))
    mixes = tuple(Mix("slerp", (("math", 3 - i),), ("base", i), params({"t": share})) for i in range(4))
    ends = Mix("slerp", (("math", None),), ("base", None), params({"t": share}))
    out = dict(merge.merged_tensors(Recipe("base", mixes, ends, ends, out_dtype="float32"), parents))
    for name, tensor in out.items():
        own = (
            name
            if "layers" not in name
            else re.sub(r"layers\.(\d)", lambda found: f"layers.{3 - int(found[1])}", name)
        )
        from_base = "layers.3." in name or name == "lm_head.weight"
        want = parents["base"].tensor(name) if from_base else parents["math"].tensor(own)
        torch.testing.assert_close(tensor, want.float())


def test_numbers_without_a_filter_that_fits_are_the_default(parents):
    recipe = average((Filtered((("q_proj", 0.0),)), 0.5), out_dtype="float32")
    out = dict(merge.merged_tensors(recipe, parents))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        first = 0.0 if "q_proj" in name else 1.0
        want = first * parents["math"].tensor(name).float() + 0.5 * parents["code"].tensor(name).float()
        torch.testing.assert_close(out[name], want)


def test_one_setting_stands_for_every_source(parents):
    one, each = average((0.5, 0.5)), average((0.5, 0.5))
    one = replace(
        one, layers=tuple(replace(m, params=params({"weight": 0.5, "normalize": 0.0})) for m in one.layers)
    )
    assert_equal(dict(merge.merged_tensors(one, parents)), dict(merge.merged_tensors(each, parents)))


def test_the_order_of_models_does_not_change_masks(parents):
    def with_order(models):
        numbers = {"math": (0.7, 0.3), "code": (0.4, 0.6), "chat": (1.1, 0.5)}
        given = params(
            {"weight": tuple(numbers[m][0] for m in models), "density": tuple(numbers[m][1] for m in models)}
        )
        layers = tuple(
            Mix("dare_linear", tuple((m, i) for m in models), ("base", i), given) for i in range(4)
        )
        ends = Mix("dare_linear", tuple((m, None) for m in models), ("base", None), given)
        return dict(
            merge.merged_tensors(Recipe("base", layers, ends, ends, out_dtype="float32", seed=5), parents)
        )

    one, two = with_order(("math", "code", "chat")), with_order(("chat", "math", "code"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def test_masks_differ_between_seeds_tensors_and_models(parents):
    def kept(seed, model):
        given = params({"weight": (1.0,), "density": (0.5,), "rescale": 0.0})
        layers = tuple(Mix("dare_linear", ((model, i),), ("base", i), given) for i in range(4))
        ends = Mix("dare_linear", ((model, None),), ("base", None), given)
        out = dict(
            merge.merged_tensors(Recipe("base", layers, ends, ends, out_dtype="float32", seed=seed), parents)
        )
        return {n: t != parents["base"].tensor(n).float() for n, t in out.items()}

    q = "model.layers.{}.self_attn.q_proj.weight"
    for one, two in [
        (kept(0, "math")[q.format(0)], kept(1, "math")[q.format(0)]),
        (kept(0, "math")[q.format(0)], kept(0, "math")[q.format(1)]),
        (kept(0, "math")[q.format(0)], kept(0, "code")[q.format(0)]),
    ]:
        agreement = (one == two).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / 32


def test_arithmetic_is_in_float32_and_rounded_once(parents):
    recipe = average((0.3, 0.3, 0.4))
    wide = dict(merge.merged_tensors(replace(recipe, out_dtype="float32"), parents))
    narrow = dict(merge.merged_tensors(recipe, parents))
    for name in wide:
        exact = sum(
            w * parents[m].tensor(name).double() for m, w in zip(MODELS, (0.3, 0.3, 0.4), strict=True)
        )
        torch.testing.assert_close(wide[name].double(), exact, rtol=1e-6, atol=1e-7)
        assert torch.equal(narrow[name], wide[name].bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_output_has_the_type_asked_for(dtype, parents, tmp_path):
    checkpoint_writer.write(candidate("slerp", out_dtype=dtype), parents, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_integer_tensors_are_the_bases(tiny, tmp_path):
    parents = {}
    for number, name in enumerate(("base", "math")):
        shutil.copytree(tiny[name], tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file(
            load_file(file) | {"model.layers.1.self_attn.positions": torch.arange(5) + 10 * number},
            file,
            metadata={"format": "pt"},
        )
        parents[name] = Checkpoint(tmp_path / name)
    mixes = tuple(Mix("task_arithmetic", (("math", i),), ("base", i)) for i in range(4))
    ends = Mix("task_arithmetic", (("math", None),), ("base", None))
    out = dict(merge.merged_tensors(Recipe("base", mixes, ends, ends), parents))
    assert out["model.layers.1.self_attn.positions"].tolist() == [0, 1, 2, 3, 4]


# ---- on disk


def test_the_folder_is_a_model_that_transformers_loads_and_runs(parents, resident, tmp_path, tiny):
    from transformers import AutoTokenizer

    recipe = candidate("ties")
    checkpoint_writer.write(recipe, parents, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    merge.merge_into(recipe, parents, resident)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids).logits, resident.model(ids).logits)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        # the class that every version of transformers knows
        expected = (tiny["base"] / file).read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        assert (out / file).read_text() == expected
    assert AutoTokenizer.from_pretrained(out)("w0 w5")["input_ids"] == [4, 9]
    config = json.loads((tiny["base"] / "config.json").read_text())
    older = {"rope_theta": config["rope_parameters"]["rope_theta"]}  # which transformers 4 reads
    assert json.loads((out / "config.json").read_text()) == config | older | {"dtype": "bfloat16"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("layers", [(0,), (0, 3), (0, 1, 2, 3, 1, 2, 3)])
def test_a_stack_of_another_depth_loads(layers, parents, tmp_path):
    recipe = stack(*(("math", layer) for layer in layers))
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert len(model.model.layers) == len(layers)
    assert_equal(model.state_dict(), dict(merge.merged_tensors(recipe, parents)))


def test_another_depth_and_a_type_for_each_layer_agree_or_are_refused(tiny, tmp_path):
    """Qwen3 and Gemma list a type for each layer; a list of the old length breaks the reload."""
    shutil.copytree(tiny["math"], tmp_path / "math")
    config = json.loads((tmp_path / "math" / "config.json").read_text())
    (tmp_path / "math" / "config.json").write_text(
        json.dumps(config | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]})
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {tmp_path / 'math'}, layer_range: [0, 4]}}]\n- sources: [{{model: "
        f"{tmp_path / 'math'}, layer_range: [2, 4]}}]\n"
    )
    try:
        merge_recipe_file(file, tmp_path / "out")
    except EvomergeError as error:
        refused = str(error)
    else:
        refused = ""
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["layer_types"] == ["full_attention"] * 3 + [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ]
    assert not refused or "layer_types" in refused


def test_tied_embeddings_stay_tied(tmp_path):
    paths = build(tmp_path / "tied", torch.bfloat16, ("base", "math"), layers=4, tied=True)
    parents = {name: Checkpoint(path) for name, path in paths.items()}
    recipe = Recipe("base", *_slerp_everywhere(0.5))
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    resident = live(paths["base"])
    merge.merge_into(recipe, parents, resident)
    assert_equal(resident.model.state_dict(), model.state_dict())


def _slerp_everywhere(t: float) -> tuple:
    ends = Mix("slerp", (("math", None),), ("base", None), params({"t": t}))
    return tuple(Mix("slerp", (("math", i),), ("base", i), params({"t": t})) for i in range(4)), ends, ends


def test_progress_counts_the_tensors(parents, tmp_path):
    seen: list[tuple[int, int]] = []
    checkpoint_writer.write(
        candidate("linear"), parents, tmp_path / "out", lambda *numbers: seen.append(numbers)
    )
    total = len(parents["base"].tensors)
    assert seen == [(done, total) for done in range(1, total + 1)]


# ---- failure


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt, RuntimeError])
def test_a_merge_that_is_stopped_leaves_nothing(stop, parents, tmp_path):
    def progress(done: int, total: int) -> None:
        if done == 20:
            raise stop

    with pytest.raises(stop):
        checkpoint_writer.write(candidate("linear"), parents, tmp_path / "out", progress)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_or_file_is_refused_and_left_alone(parents, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("folder", "file"):
        with pytest.raises(SetupError, match=f"{name} exists; choose another"):
            checkpoint_writer.write(candidate("linear"), parents, tmp_path / name)
    assert files(tmp_path) == dict.fromkeys(("file", "folder/mine"), hashlib.sha256(b"kept").hexdigest())


def test_weights_that_sum_to_zero_fail_the_candidate_and_name_the_tensor(parents, resident, tmp_path):
    only_there = Filtered((("layers.2.mlp.up_proj", -1.0), ("*", 1.0)))
    recipe = average((1.0, only_there), {"normalize": 1.0})
    for attempt in (
        lambda: list(merge.merged_tensors(recipe, parents)),
        lambda: merge.merge_into(recipe, parents, resident),
        lambda: checkpoint_writer.write(recipe, parents, tmp_path / "out"),
    ):
        with pytest.raises(
            CandidateError,
            match=r"not finite in tensor 'model\.layers\.2\.mlp\.up_proj\.weight' \(linear of math, code\)",
        ):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_number_too_large_for_the_output_fails_the_candidate(parents):
    with pytest.raises(CandidateError, match=r"not finite in tensor 'model\.layers\.0\."):
        list(merge.merged_tensors(stack(("math", 0), values={"scale": (1e8,)}, out_dtype="float16"), parents))


def test_a_live_model_keeps_its_depth(parents, resident):
    with pytest.raises(CandidateError, match="the recipe has 2 layers, the live model 4"):
        merge.merge_into(stack(("math", 0), ("math", 1)), parents, resident)


def small_gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=8, bos_token_id=1, eos_token_id=2
        )
    )


def test_a_live_model_with_other_names_is_refused(parents):
    with pytest.raises(CheckpointError, match=r"has no place for 'model\.embed_tokens\.weight'"):
        WeightMap(small_gpt2(), parents["base"].tensors)


BAD = {
    "unknown method": (
        lambda r: layer_2(r, method="tie"),
        r"unknown merge method 'tie'\. Did you mean 'ties'\?",
    ),
    "unknown parameter": (
        lambda r: layer_2(r, params=(("wieght", 1.0),)),
        r"no parameter 'wieght' \(layer 2\)\. Did you mean 'weight'\?",
    ),
    "density": (
        lambda r: layer_2(r, method="ties", base=("base", 2), params=(("density", (0.5, 1.5)),)),
        r"density must be in \[0, 1\], got 1.5 \(layer 2, model code\)",
    ),
    "density in a filter": (
        lambda r: layer_2(
            r, method="ties", base=("base", 2), params=(("density", Filtered((("mlp", 0.5), ("*", -1.0)))),)
        ),
        r"density must be in \[0, 1\], got -1 \(layer 2\)",
    ),
    "not a number": (
        lambda r: layer_2(r, params=(("weight", (1.0, float("nan"))),)),
        r"weight .*nan \(layer 2, model code\)",
    ),
    "t for each model": (
        lambda r: layer_2(
            r, method="slerp", base=("base", 2), sources=(("math", 2),), params=(("t", (0.5,)),)
        ),
        r"t of slerp is one value for the merge.*\(layer 2\)",
    ),
    "no base": (
        lambda r: layer_2(r, method="task_arithmetic", params=()),
        r"task_arithmetic needs a base model \(layer 2\)",
    ),
    "too many": (
        lambda r: layer_2(r, method="slerp", base=("base", 2), params=()),
        r"slerp takes 1 source models besides the base, got 2 \(layer 2\)",
    ),
    "head": (lambda r: replace(r, head=replace(r.head, params=(("nothing", 1.0),))), r"\(head\)"),
    "embeddings": (
        lambda r: replace(r, embeddings=replace(r.embeddings, params=(("nothing", 1.0),))),
        r"\(embeddings\)",
    ),
    "dtype": (lambda r: replace(r, dtype="int8", policy="mergekit"), "unknown dtype 'int8'. Known: float32"),
    "out_dtype": (lambda r: replace(r, out_dtype="fp16"), "unknown dtype 'fp16'"),
}


def layer_2(recipe: Recipe, **changes) -> Recipe:
    return replace(
        recipe, layers=(*recipe.layers[:2], replace(recipe.layers[2], **changes), recipe.layers[3])
    )


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_that_no_method_accepts_is_refused_before_anything_is_written(name, parents, tmp_path):
    change, message = BAD[name]
    recipe = average((0.5, 0.5))
    tensor_plan.check(recipe)
    with pytest.raises(RecipeError, match=message):
        tensor_plan.check(change(recipe))
    with pytest.raises(RecipeError, match=message):
        checkpoint_writer.write(change(recipe), parents, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- parents that do not fit


def changed_copy(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
@pytest.mark.parametrize("rows", [66, 1])
def test_a_vocabulary_of_another_size_is_an_error_of_ours(method, rows, tiny, tmp_path):
    odd = changed_copy(
        tiny["math"],
        tmp_path / "odd",
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(rows, 32, dtype=torch.bfloat16)}),
    )
    number = "t: 0.5" if method == "slerp" else "weight: 0.5"
    other = tiny["base"] if method != "linear" else tiny["code"]
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"merge_method: {method}\nbase_model: {other}\nmodels: [{{model: {other}}}, {{model: "
        f"{odd}}}]\nparameters: {{{number}}}\n"
    )
    with pytest.raises(EvomergeError, match=r"model\.embed_tokens\.weight"):
        merge_recipe_file(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_a_parent_lacks_is_an_error_of_ours(tiny, tmp_path):
    odd = changed_copy(tiny["math"], tmp_path / "odd", lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    file = tmp_path / "recipe.yaml"
    for models in ([tiny["code"], odd], [odd, tiny["code"]]):
        listed = ", ".join(f"{{model: {m}}}" for m in models)
        file.write_text(
            f"merge_method: linear\nbase_model: {tiny['code']}\nmodels: [{listed}]\nparameters: {{weight: "
            f"0.5}}\n"
        )
        with pytest.raises(EvomergeError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
            merge_recipe_file(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- an exported recipe.json


def exported(folder: Path, recipe: Recipe, lineage) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(recipe.canonical())
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return folder / "recipe.json"


def test_an_exported_recipe_merges_as_the_recipe_did(tiny, parents, tmp_path):
    recipe = candidate("dare_ties", 4)
    facts = {name: {"path": str(path), "revision": None} for name, path in tiny.items()}
    merge_recipe_file(exported(tmp_path / "x", recipe, {"facts": {"parents": facts}}), tmp_path / "out")
    assert_equal(
        load_file(tmp_path / "out" / "model.safetensors"), dict(merge.merged_tensors(recipe, parents))
    )


@pytest.mark.parametrize(
    "lineage",
    [
        [],
        {},
        {"facts": {}},
        {"facts": {"parents": []}},
        {"facts": {"parents": {}}},
        {"facts": {"parents": {"math": {"path": 3, "revision": None}}}},
    ],
    ids=str,
)
def test_a_lineage_that_does_not_name_the_parents_is_an_error_of_ours(lineage, tmp_path):
    with pytest.raises(EvomergeError):
        merge_recipe_file(exported(tmp_path / "x", candidate("dare_ties"), lineage), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_its_lineage_says_what_is_missing(tmp_path):
    exported(tmp_path / "x", candidate("ties"), {})
    (tmp_path / "x" / "lineage.json").unlink()
    with pytest.raises(RecipeError, match=r"lineage\.json is missing"):
        merge_recipe_file(tmp_path / "x" / "recipe.json", tmp_path / "out")


def test_a_policy_asked_of_an_exported_recipe_is_refused_not_ignored(tmp_path):
    with pytest.raises(RecipeError, match="says its own arithmetic policy"):
        merge_recipe_file(
            exported(tmp_path / "x", candidate("ties"), {}), tmp_path / "out", policy="mergekit"
        )
    assert not (tmp_path / "out").exists()
