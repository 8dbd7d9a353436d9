"""mergekit's YAML, read and written: gradients, precedence, round trips, mistakes named with their place."""

import random
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.errors import ConfigError, EvomergeError, RecipeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import merge, tensor_plan
from evomerge.recipes import Filtered, Mix, Recipe, mergekit_yaml, params
from tests.support.merge_cases import space
from tests.support.mergekit_recipes import CORNERS, DARE, DETERMINISTIC, block

NAMES = {n: n for n in ("base", "math", "code", "chat")}
OUTER = ("model.embed_tokens.weight",), ("lm_head.weight", "model.norm.weight")


def load(text: str, depth: int = 4) -> Recipe:
    return mergekit_yaml.load(_yaml.parse_all(text, "recipe.yaml"), lambda reference: depth)


def dump(recipe: Recipe, references: dict[str, str] | None = None, header=()) -> str:
    return mergekit_yaml.dump(mergekit_yaml.with_outer_filters(recipe, *OUTER), references or NAMES, header)


def at(mix: Mix, param: str, tensor: str, source: int | None = None) -> float:
    """A parameter's number for a tensor name."""
    value = dict(mix.params)[param]
    if isinstance(value, tuple):
        value = value[source]
    return value.at(tensor) if isinstance(value, Filtered) else value


# ---- gradients


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-80, 80).map(lambda i: i / 16), min_size=1, max_size=7),
    depth=st.integers(1, 9),
)
def test_a_gradient_is_piecewise_linear_over_the_depth(values, depth):
    recipe = load(
        f"{{merge_method: linear, base_model: math, models: [{{model: math, "
        f"parameters: {{weight: {values}}}}}]}}",
        depth,
    )
    corners, depths = np.linspace(0, 1, len(values)), np.linspace(0, 1, depth) if depth > 1 else [1.0]
    got = [at(mix, "weight", "any", 0) for mix in recipe.layers]
    np.testing.assert_allclose(got, np.interp(depths, corners, values), rtol=1e-12, atol=1e-12)
    assert at(recipe.embeddings, "weight", "any", 0) == at(recipe.head, "weight", "any", 0) == values[0]


def test_a_gradient_starts_anew_in_each_slice_and_ends_at_its_start():
    recipe = load("""
merge_method: linear
base_model: math
slices:
  - sources: [{model: math, layer_range: [0, 3], parameters: {weight: [1, 3]}}]
  - sources: [{model: math, layer_range: [3, 4], parameters: {weight: [5, 7]}}]
  - sources:
    - model: math
      layer_range: [0, 2]
      parameters: {weight: [{filter: mlp, value: [10, 20]}, {value: [30, 40]}]}
""")
    assert [at(mix, "weight", "mlp", 0) for mix in recipe.layers] == [1, 2, 3, 7, 10, 20]
    assert [at(mix, "weight", "attn", 0) for mix in recipe.layers] == [1, 2, 3, 7, 30, 40]
    assert [mix.sources[0][1] for mix in recipe.layers] == [0, 1, 2, 3, 0, 1]
    assert (
        at(recipe.embeddings, "weight", "mlp", 0),
        at(recipe.head, "weight", "mlp", 0),
        at(recipe.head, "weight", "norm", 0),
    ) == (1, 10, 30)


# ---- precedence

TENSORS = [
    f"model.layers.{i}.{part}.weight"
    for i in range(4)
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
]
NUMBER = st.integers(1, 99).map(lambda i: i / 100)
VALUE = NUMBER | st.lists(NUMBER, min_size=1, max_size=4)
FILTER = st.sampled_from(["mlp", "q_proj", "layers.2", "norm", "nothing", "weight", "*", None])
CASES = st.lists(st.tuples(FILTER, VALUE), min_size=1, max_size=4).map(
    lambda cases: [{"filter": text, "value": value} if text else {"value": value} for text, value in cases]
)
LEVEL = st.none() | VALUE | CASES


def first_hit(levels, tensor: str, depth: float, default: float) -> float:
    """The first level that says something about the tensor."""
    for level in levels:
        if level is None:
            continue
        conditional = isinstance(level, list) and isinstance(level[0], dict)
        for case in level if conditional else [{"value": level}]:
            if case.get("filter", "*") in ("*", None) or case["filter"] in tensor:
                value = np.atleast_1d(case["value"])
                return np.interp(depth, np.linspace(0, 1, len(value)), value)
    return default


@settings(max_examples=150, deadline=None, derandomize=True)
@given(levels=st.tuples(LEVEL, LEVEL, LEVEL), shared=st.tuples(LEVEL, LEVEL))
def test_the_first_level_that_names_the_tensor_wins(levels, shared):
    def given_at(name, value):
        return {} if value is None else {name: value}

    source, slice_, top = levels
    data = {
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"weight": 1.0, **given_at("density", top), **given_at("lambda", shared[1])},
        "slices": [
            {
                "sources": [
                    {"model": "math", "layer_range": [0, 4], "parameters": given_at("density", source)},
                    {"model": "code", "layer_range": [0, 4]},
                    {"model": "base", "layer_range": [0, 4]},
                ],
                "parameters": {**given_at("density", slice_), **given_at("lambda", shared[0])},
            }
        ],
    }
    recipe = load(yaml.safe_dump(data))
    for mix, depth in [
        (recipe.embeddings, 0.0),
        *((m, i / 3) for i, m in enumerate(recipe.layers)),
        (recipe.head, 0.0),
    ]:
        for tensor in TENSORS:
            assert at(mix, "density", tensor, 0) == pytest.approx(
                first_hit([source, slice_, top], tensor, depth, 1.0), abs=1e-12
            )
            assert at(mix, "density", tensor, 1) == pytest.approx(
                first_hit([slice_, top], tensor, depth, 1.0), abs=1e-12
            )
            assert at(mix, "lambda", tensor) == pytest.approx(
                first_hit(shared, tensor, depth, 1.0), abs=1e-12
            )


def test_without_parameters_a_method_has_its_defaults():
    recipe = load(
        "{merge_method: dare_ties, base_model: base, models: [{model: math}], parameters: {weight: 0.5}}"
    )
    assert dict(recipe.layers[0].params) == {
        "weight": (0.5,),
        "density": (1.0,),
        "lambda": 1.0,
        "normalize": 0.0,
        "rescale": 1.0,
    }
    assert recipe.layers[2] == Mix("dare_ties", (("math", 2),), ("base", 2), recipe.layers[0].params)
    assert (
        recipe.embeddings
        == recipe.head
        == replace(recipe.layers[0], sources=(("math", None),), base=("base", None))
    )


@pytest.mark.parametrize(
    ("head", "out"),
    [
        ("dtype: float16", "float16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("out_dtype: float32", "float32"),
    ],
)
def test_the_output_has_its_own_type_else_that_of_the_arithmetic(head, out):
    recipe = load(f"merge_method: passthrough\nmodels: [{{model: math}}]\n{head}\n")
    assert (recipe.dtype, recipe.out_dtype) == ("float32", out)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1e3),
        ("-.5", -0.5),
        ("+2", 2.0),
        ("3.", 3.0),
        ("2.5e-1", 0.25),
        ("true", 1.0),
        ("false", 0.0),
        ("0", 0.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(written, number):
    recipe = load(
        f"{{merge_method: task_arithmetic, base_model: base, models: [{{model: math}}], "
        f"parameters: {{weight: {written}}}}}"
    )
    assert at(recipe.layers[0], "weight", "any", 0) == number


# ---- round trips

TEXTS = {
    n: Template(block(t)).substitute(NAMES)
    for n, t in {**DETERMINISTIC, **CORNERS, **DARE}.items()
    if n != "gradient-of-switches"
}


def same_merge(first: Recipe, second: Recipe, folders: dict[str, Path]) -> None:
    parents = {name: Checkpoint(path) for name, path in folders.items()}
    one, two = dict(merge.merged_tensors(first, parents)), dict(merge.merged_tensors(second, parents))
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert (first.base, first.out_dtype) == (second.base, second.out_dtype)


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_read_and_written_merges_to_the_same_tensors(name, tiny32):
    recipe = load(TEXTS[name])
    same_merge(recipe, load(dump(recipe)), tiny32)


@pytest.mark.parametrize(
    "method", ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough"]
)
def test_a_candidate_written_and_read_merges_to_the_same_tensors(method, tiny32):
    of = space(method, "bfloat16")
    for seed in range(2):
        recipe = of.decode(torch.randn(len(of.axes), generator=torch.Generator().manual_seed(seed)).tolist())
        same_merge(recipe, load(dump(recipe)), tiny32)


def test_embeddings_with_their_own_numbers_are_never_lost(tiny32):
    """Without the names of their tensors they cannot be written; then that is said."""
    recipe = load(
        "{merge_method: linear, base_model: math, models: [{model: math}, {model: code}], "
        "parameters: {weight: 1}}"
    )
    own = replace(
        recipe,
        embeddings=replace(recipe.embeddings, params=params({"weight": (0.25, 0.5), "normalize": 1.0})),
    )
    try:
        text = mergekit_yaml.dump(own, NAMES)
    except RecipeError:
        return
    same_merge(own, load(text), tiny32)


def test_filters_that_miss_a_tensor_are_written_with_the_default_they_mean(tiny32):
    """A recipe's filters may miss; mergekit would go on to the next level, or stop for want of a number."""
    recipe = load(
        "{merge_method: linear, base_model: math, models: [{model: math}, {model: code}], "
        "parameters: {weight: 0.25}}"
    )
    missing = params({"weight": (Filtered((("q_proj", 0.5),)), 0.25), "normalize": 1.0})
    for changed in (
        replace(recipe, embeddings=replace(recipe.embeddings, params=missing)),
        replace(recipe, head=replace(recipe.head, params=missing)),
        replace(recipe, layers=tuple(replace(m, params=missing) for m in recipe.layers)),
    ):
        text = dump(changed)
        same_merge(changed, load(text), tiny32)
        for source in [source for part in yaml.safe_load(text)["slices"] for source in part["sources"]]:
            weight = source["parameters"]["weight"]
            assert not isinstance(weight, list) or weight[-1]["filter"] == "*"


def test_embeddings_and_head_of_other_models_are_slices_without_layers():
    recipe = load(
        "{merge_method: passthrough, base_model: math, slices: [{sources: [{model: math, "
        "layer_range: [0, 4]}]}]}"
    )
    other = replace(recipe, embeddings=replace(recipe.embeddings, sources=(("code", None),)))
    text = dump(other)
    ranges = [s["sources"][0]["layer_range"] for s in yaml.safe_load(text)["slices"]]
    assert ranges == [[0, 0], [0, 4], [0, 0]]
    assert load(text) == other
    merged = load(
        "{merge_method: linear, base_model: math, models: [{model: math}], parameters: {weight: 1}}"
    )
    with pytest.raises(RecipeError, match="embeddings"):
        dump(replace(merged, embeddings=replace(merged.embeddings, sources=(("code", None),))))


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_written_leaves_mergekit_nothing_to_guess(name):
    recipe = load(TEXTS[name])
    data = yaml.safe_load(dump(recipe))
    assert data["base_model"] == recipe.base
    assert (data["dtype"], data["out_dtype"]) == (recipe.dtype, recipe.out_dtype)
    assert sum(
        s["sources"][0]["layer_range"][1] - s["sources"][0]["layer_range"][0] for s in data["slices"]
    ) == len(recipe.layers)
    shared = {p for p, _ in recipe.layers[0].params} & {"normalize", "rescale", "lambda", "t"}
    for part in data["slices"]:
        models = [source["model"] for source in part["sources"]]
        assert len(set(models)) == len(models)
        if recipe.layers[0].base:
            assert part.get("base_model", data["base_model"]) in models
        assert shared <= set(data.get("parameters", {})) | set(part.get("parameters", {}))
        for holder in (data, part, *part["sources"]):
            for value in holder.get("parameters", {}).values():
                assert isinstance(value, bool | float | list)
                if isinstance(value, list):
                    assert all(set(case) == {"filter", "value"} for case in value)
                    assert value[-1]["filter"] == "*"
                    assert [case["filter"] for case in value].count("*") == 1


def test_layers_that_differ_in_nothing_but_their_number_are_one_slice():
    recipe = load(TEXTS["passthrough"])
    assert len(yaml.safe_load(dump(recipe))["slices"]) == 1
    assert len(yaml.safe_load(dump(load(TEXTS["passthrough-deeper"])))["slices"]) == 4
    assert (
        len(yaml.safe_load(dump(load(TEXTS["linear-gradients"])))["slices"]) == 4
    )  # each layer has its own number


@pytest.mark.parametrize("number", [1e-5, 1e-12, 123456789.125, 1e22, 0.1, -0.0001, 1 / 3])
def test_every_number_is_read_back_exactly_also_by_plain_pyyaml(number):
    recipe = load(
        "{merge_method: task_arithmetic, base_model: base, models: [{model: math}], parameters: {weight: 1}}"
    )
    recipe = replace(
        recipe,
        layers=tuple(
            replace(m, params=params(dict(m.params) | {"weight": (number,)})) for m in recipe.layers
        ),
    )
    text = dump(recipe)
    assert at(load(text).layers[0], "weight", "any", 0) == number
    assert yaml.safe_load(text)["slices"][0]["sources"][0]["parameters"]["weight"][-1]["value"] == number


@pytest.mark.parametrize(
    "reference",
    [
        "/models/a b: c#d",
        "org/name@main",
        "/模型/ä",
        "no",
        "1.5",
        "/" + "long " * 60,
        "- x",
        "{y}",
        "'",
        '"',
        "*a",
        "&b",
    ],
)
def test_any_reference_is_read_back_as_it_was(reference):
    text = dump(load(TEXTS["slerp"]), NAMES | {"math": reference})
    assert load(text).layers[0].sources[0][0] == reference
    assert yaml.safe_load(text)["slices"][0]["sources"][0]["model"] == reference


def test_a_header_is_comments_whatever_is_in_it():
    text = dump(load(TEXTS["slerp"]), header=["one: 1", "two\nmerge_method: linear", ""])
    assert load(text) == load(dump(load(TEXTS["slerp"])))
    assert all(line.startswith("#") for line in text.splitlines()[:3])


# ---- mistakes: § marks the place that the message must name; without it, any place will do

LINEAR = "merge_method: linear\nbase_model: math\n"
TIES = "merge_method: ties\nbase_model: base\n"
FIRST = "models: [{model: first}]\nparameters: {weight: 1}\n"
MISTAKES = {
    "a filter that is no list and misses": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: {filter: mlp, value: 1}\n",
        "weight for model 'math' has no value for tensors that its filters miss",
    ),
    "a filter that is no list and has no value": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: {filter: mlp, value: high}\n",
        "weight must be a finite number, got 'high'",
    ),
    "a filter that is a number": (
        TIES + "models: [{model: math}]\nparameters:\n  weight:\n  - {§filter: 3, value: 1}\n",
        "a filter is text, got 3",
    ),
    "numbers among filters": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: [1, {filter: mlp, value: 1}]\n",
        "mixes numbers and filter",
    ),
    "a filter without a value": (
        TIES + "models: [{model: math}]\nparameters:\n  weight:\n  - §filter: mlp\n",
        "weight must be a finite number, got None",
    ),
    "an empty list of numbers": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: []\n",
        "weight is an empty list",
    ),
    "an empty gradient in a filter": (
        TIES + "models: [{model: math}]\nparameters:\n  weight:\n  - §{filter: mlp, value: []}\n",
        "weight must be a finite number",
    ),
    "a list of lists": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: [1, §[2, 3]]\n",
        r"weight must be a finite number, got \[2, 3\]",
    ),
    "base missing in a slice": (
        TIES + "slices:\n- §sources:\n  - {model: math, layer_range: [0, 4]}\nparameters: {weight: 1}\n",
        "ties needs the base 'base' among the sources",
    ),
    "base missing altogether": (
        "merge_method: ties\n§models:\n- {model: math}\nparameters: {weight: 1}\n",
        "ties needs base_model",
    ),
    "nothing beside the base": (
        "merge_method: slerp\nbase_model: base\n§models:\n- {model: base}\nparameters: {t: 1}\n",
        "slerp takes 1 source model besides the base, got 0",
    ),
    "one model for two": (
        "merge_method: model_stock\nbase_model: base\n§models:\n- {model: base}\n",
        "model_stock takes 2 source models or more besides the base, got 0",
    ),
    "a model twice": (
        LINEAR + "slices:\n- §sources: [{model: math, layer_range: [0, 2]}, {model: math, layer_range: [2, "
        "4]}]\nparameters: {weight: 1}\n",
        "'math' is listed twice",
    ),
    "a model twice among the models": (
        LINEAR + "§models: [{model: math}, {model: math}]\nparameters: {weight: 1}\n",
        "'math' is listed twice",
    ),
    "a layer beyond the last": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [2, 5]\n",
        r"0 <= first < end <= 4 for math, got \[2, 5\]",
    ),
    "layers backwards": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [3, 1]\n",
        "layer_range must be",
    ),
    "no layers": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [2, 2]\n",
        "layer_range must be",
    ),
    "a negative layer": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [-1, 2]\n",
        "layer_range must be",
    ),
    "layers in halves": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [0, 1.5]\n",
        "layer_range must be",
    ),
    "true for a layer": (
        LINEAR + "slices:\n- sources:\n  - model: math\n    §layer_range: [false, 2]\n",
        "layer_range must be",
    ),
    "layer_range missing": (LINEAR + "slices:\n- sources:\n  - §model: math\n", "layer_range must be"),
    "unequal slices": (
        LINEAR + "slices:\n- §sources: [{model: math, layer_range: [0, 2]}, {model: code, layer_range: [0, "
        "3]}]\nparameters: {weight: 1}\n",
        r"same number of layers, got \[2, 3\]",
    ),
    "an unknown method": (
        "§merge_method: tie\nbase_model: base\nmodels: [{model: math}]\n",
        r"unknown merge method 'tie'\. Did you mean 'ties'\?",
    ),
    "no method": ("§models: [{model: math}]\n", "merge_method must be text, got None"),
    "density above one": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: 1\n  §density: 1.5\n",
        r"density must be in \[0, 1\], got 1.5",
    ),
    "density above one in a gradient": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: 1\n  density: [0.5, §1.5]\n",
        r"density must be in \[0, 1\]",
    ),
    "t above one": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: math}]\nparameters: {§t: 1.5}\n",
        r"t must be in \[0, 1\], got 1.5",
    ),
    "not a number": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: .nan\n",
        "weight must be a finite number, got nan",
    ),
    "infinity": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: -.inf\n",
        "weight must be a finite number, got -inf",
    ),
    "a number of 400 digits": (
        TIES + f"models: [{{model: math}}]\nparameters:\n  §weight: {'9' * 400}\n",
        "weight must be a finite number",
    ),
    "no for false": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: 1\n  §normalize: no\n",
        "normalize must be a finite number, got 'no'",
    ),
    "half a switch": (
        TIES + "models: [{model: math}]\nparameters:\n  weight: 1\n  §normalize: 0.5\n",
        "normalize",
    ),
    "a number in quotes": (
        TIES + "models: [{model: math}]\nparameters:\n  §weight: '0.5'\n",
        "weight must be a finite number, got '0.5'",
    ),
    "a key twice": (TIES + "models: [{model: math}]\n§base_model: math\n", "repeats the key 'base_model'"),
    "a key twice, deep": (
        TIES + "models:\n- {model: math, parameters: {weight: 1, §weight: 2}}\n",
        "repeats the key 'weight'",
    ),
    "an alias of nothing": (TIES + "models: §*x\n", "not valid YAML: found undefined alias"),
    "an alias inside itself": (TIES + "models: §&x [*x]\n", "nested deeper than 32 levels"),
    "a merge key of numbers": (
        TIES + "models: [{model: math}]\nparameters:\n  §<<: [1, 2]\n",
        "is a merge key, which takes a mapping",
    ),
    "a key that is a list": (TIES + "models: [{model: math}]\nparameters: {? §[1] : 2}\n", "not plain text"),
    "nested too deep": (
        TIES
        + "models: [{model: math}]\nparameters: {weight: "
        + "[" * 30
        + "§"
        + "[" * 40
        + "]" * 70
        + "}\n",
        "nested deeper than 32",
    ),
    "models and slices": (
        "§merge_method: linear\nmodels: [{model: math}]\nslices: [{sources: [{model: math, "
        "layer_range: [0, 4]}]}]\n",
        "exactly one of models, slices and modules, got models and slices",
    ),
    "neither models nor slices": (
        "§merge_method: linear\nbase_model: math\n",
        "exactly one of models, slices and modules, got none",
    ),
    "models without an entry": (LINEAR + "§models: []\n", "models must be a list of mappings"),
    "models as names": (LINEAR + "§models: [math, code]\n", "models must be a list of mappings"),
    "models as a mapping": (LINEAR + "§models: {model: math}\n", "models must be a list of mappings"),
    "sources missing": (
        LINEAR + "slices:\n- §parameters: {weight: 1}\n",
        "sources must be a list of mappings",
    ),
    "a model without a name": (
        LINEAR + "models:\n- §parameters: {weight: 1}\n",
        "a model must be text, got None",
    ),
    "a model that is a number": (LINEAR + "models:\n- §model: 7\n", "a model must be text, got 7"),
    "a base that is a list": (
        "merge_method: linear\n§base_model: [math]\nmodels: [{model: math}]\n",
        "a model must be text",
    ),
    "parameters as a list": (
        LINEAR + "models: [{model: math}]\n§parameters: [weight, 1]\n",
        "parameters is a mapping",
    ),
    "an adapter without a path": (
        LINEAR + "models:\n- §model: {model: math, lora: {revision: main}}\n",
        "a model is a text, or a path with a revision",
    ),
    "a tokenizer that is a number": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§tokenizer_source: 3\n",
        "must be text, got 3",
    ),
    "a tokenizer that is a word": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§tokenizer: union\n",
        "tokenizer must be a mapping",
    ),
    "two tokenizers": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\ntokenizer_source: union\n"
        "§tokenizer: {source: base}\n",
        "one of tokenizer_source and tokenizer",
    ),
    "a token of another kind": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n"
        "§tokenizer: {tokens: {w: {source: {kind: one}}}}\n",
        "the kind zero or model_token, got 'one'",
    ),
    "a token forced from nowhere": (
        LINEAR
        + "models: [{model: math}]\nparameters: {weight: 1}\n§tokenizer: {tokens: {w: {force: true}}}\n",
        "a forced token needs a source",
    ),
    "rows to a multiple of none": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§tokenizer: {pad_to_multiple_of: 0}\n",
        "pad_to_multiple_of must be a whole number",
    ),
    "a chat template that is none": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§chat_template: chatlm\n",
        "chat_template must be auto, alpaca, chatml",
    ),
    "a chat template that is a number": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§chat_template: 4\n",
        "must be text, got 4",
    ),
    "modules and models": (
        "§merge_method: linear\nmodels: [{model: math}]\nmod"
        "ules: {text_decoder: {models: [{model: math}]}}\n",
        "exactly one of models, slices and modules, got models and modules",
    ),
    "modules as a list": (LINEAR + "§modules: [{models: [{model: math}]}]\n", "modules is a mapping"),
    "a module that is a list": (
        LINEAR + "§modules: {text_decoder: [{model: math}]}\n",
        "modules is a mapping",
    ),
    "an empty module": (LINEAR + "modules:\n  §text_decoder: {}\n", "exactly one of models and slices"),
    "modules without the language model": (
        LINEAR + "§modules: {eyes: {models: [{model: math}]}, ears: {models: [{model: math}]}}\n",
        "none of the modules eyes, ears is the language model",
    ),
    "a tower that is merged": (
        LINEAR + "modules:\n  text_decoder: {models: [{model: math}]}\n"
        "  §vision_tower: {models: [{model: code}]}\nparameters: {weight: 1}\n",
        "module 'vision_tower' is not the language model: it comes from the base unmerged",
    ),
    "a type that is none": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\n§out_dtype: float33\n",
        "float33",
    ),
    "an arithmetic that is none": (
        LINEAR + "models: [{model: math}]\nparameters: {weight: 1}\nout_dtype: float32\n§dtype: float33\n",
        "float33",
    ),
    "two models for slerp": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: math}, {model: code}]\n"
        "parameters: {t: 0.5}\n",
        "slerp takes 1 source model",
    ),
    "two models passed through": (
        "merge_method: passthrough\nmodels: [{model: math}, {model: code}]\n",
        "passthrough takes 1 source model",
    ),
    "no weight": (TIES + "models:\n- model: math\n", "weight"),
    "no t": ("merge_method: slerp\nbase_model: base\nmodels: [{model: math}]\n", r"\bt\b"),
    "a recipe that is a list": ("§- merge_method: linear\n", "a recipe is a mapping"),
    "an empty file": ("§", "a recipe is a mapping"),
    "a word": ("§linear", "a recipe is a mapping"),
    "brackets that do not close": ("merge_method: linear\nmodels: [{model: math}\n§", "not valid YAML"),
    "a tab for indentation": ("merge_method: linear\nmodels:\n§\t- model: math\n", "not valid YAML"),
    "two documents": (
        LINEAR + "models: [{model: math}]\n---\n§" + LINEAR + "models: [{model: math}]\n",
        "second document without a name",
    ),
    "a stage without use": (
        LINEAR
        + "models: [{model: math}]\nparameters: {weight: 1}\n---\n§name: first\n"
        + LINEAR
        + "models: [{model: code}]\nparameters: {weight: 1}\n",
        "stage 'first' is read by none of the others",
    ),
    "a stage's name twice": (
        ("name: first\n" + LINEAR + "models: [{model: code}]\n---\n")
        + "§name: first\n"
        + LINEAR
        + "models: [{model: code}]\n---\n"
        + LINEAR,
        "name must be a text that no other document has, got 'first'",
    ),
    "a stage's name that is a number": (
        "§name: 3\n" + LINEAR + "models: [{model: code}]\n",
        "name must be a text",
    ),
    "an empty name": ("§name: ''\n" + LINEAR + "models: [{model: code}]\n", "name must be a text"),
    "a stage that needs itself": (
        "§name: first\n"
        + LINEAR
        + "models: [{model: first}]\nparameters: {weight: 1}\n---\n"
        + LINEAR
        + "models: [{model: first}]\nparameters: {weight: 1}\n",
        "stage 'first' needs itself",
    ),
    "a mistake in a stage": (
        LINEAR
        + "models: [{model: first}]\nparameters: {weight: 1}\n---\nname: first\n"
        + TIES
        + "models:\n- §model: math\n  parameters: {wieght: 1}\n",
        r"ties needs weight for model 'math'.* Left out was: recipe\.yaml:11:16 ties has no parameter "
        r"'wieght'.* Did you mean 'weight'\?",
    ),
    "an object of Python": ("merge_method: §!!python/name:os.system x\n", "YAML"),
    "a time that is none": ("merge_method: §!!timestamp x\n", "YAML"),
    "a truth that is none": ("merge_method: §!!bool perhaps\n", "YAML"),
    "an integer that is none": ("merge_method: §!!int ''\n", "YAML"),
    "a float that is none": ("merge_method: §!!float abc\n", "YAML"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_its_place(name):
    marked, message = MISTAKES[name]
    before, mark, after = marked.partition("§")
    place = f"{before.count(chr(10)) + 1}:{len(before.rpartition(chr(10))[2]) + 1}" if mark else r"\d+:\d+"
    with pytest.raises(ConfigError) as caught:
        tensor_plan.check(load(before + after))
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert re.match(rf"recipe\.yaml:{place} ", text), f"expected {place} in: {text}"


def test_models_of_different_depth_need_slices():
    depths = {"math": 4, "code": 6}
    with pytest.raises(
        RecipeError,
        match=r"^recipe.yaml:3:1 models differ in depth: math has 4, code has 6 layers; use slices",
    ):
        mergekit_yaml.load(
            _yaml.parse(
                LINEAR + "models: [{model: math}, {model: code}]\nparameters: {weight: 1}\n", "recipe.yaml"
            ),
            depths.__getitem__,
        )


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    for content, message in [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: 1\n" * 250_000, "at most 500,000"),
        (b"a: \x01\n", "not valid YAML"),
        (None, "cannot read"),
    ]:
        file.write_bytes(content) if content else file.unlink()
        with pytest.raises(ConfigError, match=message):
            _yaml.read(file)


@pytest.mark.parametrize(
    "reference",
    [
        "/no/such/folder",
        "~nobody-of-that-name/x",
        "/" + "x" * 5000,
        "./x\x00y",
        "a b c",
        "",
        "../..",
        "a@b@c d",
    ],
)
def test_a_model_that_is_not_there_is_an_error_of_ours(reference, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": reference}]}))
    with pytest.raises(EvomergeError) as caught:
        merge_recipe_file(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- anything at all

PIECES = [
    "",
    "0",
    "-1",
    "1e999",
    "null",
    "~",
    "[]",
    "{}",
    "''",
    "'",
    '"',
    ": ",
    "- ",
    "\n",
    "\n  ",
    "\t",
    "#",
    "&a ",
    "*a",
    "!!int ",
    "!x ",
    "|",
    ">",
    "%",
    "@",
    "\u2028",
]
PIECES += [
    "true",
    "no",
    ".nan",
    "[1, 2]",
    "{filter: mlp, value: 1}",
    "\x07",
    "é",
    "99999999999999999999",
    "? ",
    "<<: ",
    "---\n",
    "weight",
    "layer_range",
    "model",
    "[" * 40,
]


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        tokens = re.findall(r"\s+|\w+|[^\w\s]", text)
        match rng.randrange(6):
            case 0:
                del tokens[rng.randrange(len(tokens))]
            case 1:
                tokens[rng.randrange(len(tokens))] = rng.choice(PIECES)
            case 2:
                tokens.insert(rng.randrange(len(tokens)), rng.choice(PIECES))
            case 3:
                i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
                tokens[i], tokens[j] = tokens[j], tokens[i]
            case 4:
                lines = "".join(tokens).splitlines(keepends=True)
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                tokens = lines
            case 5:
                start = rng.randrange(len(tokens))
                del tokens[start : start + rng.randint(1, 8)]
        text = "".join(tokens) or "x"
    return text


def outcome(text: str) -> Recipe | Exception:
    try:
        recipe = mergekit_yaml.load(_yaml.parse_all(text, "fuzz.yaml"), lambda reference: 4)
        tensor_plan.check(recipe)
    except Exception as error:
        return error
    return recipe


def test_whatever_is_written_is_read_or_refused_by_an_error_of_ours():
    rng, texts = random.Random(1), list(TEXTS.values())
    read = 0
    for _ in range(1500):
        text = mutated(rng, textwrap.dedent(rng.choice(texts)))
        found = outcome(text)
        if isinstance(found, Recipe):
            read += 1
            assert Recipe.from_json(found.canonical()) == found
        else:
            assert isinstance(found, EvomergeError), f"{found!r} for\n{text}"
            assert re.match(r"fuzz\.yaml(:\d+:\d+)? [^\n]+$", str(found)), (
                f"no place or more than a line in '{found}' for\n{text}"
            )
    assert read > 60  # not everything is refused
