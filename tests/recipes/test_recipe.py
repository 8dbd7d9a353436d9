"""A recipe is a value: equal recipes have one text and one id, on every machine, and back."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipes import STORED, Filtered, Mix, Recipe, TokenDonor, TokenizerSpec, params, setting

TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
SETTING = NUMBER | st.lists(st.tuples(TEXT, NUMBER), min_size=1, max_size=3).map(
    lambda cases: Filtered(tuple(cases))
)
LAYER = st.none() | st.integers(0, 200)
SOURCE = st.tuples(TEXT, LAYER)


@st.composite
def mixes(draw):
    sources = tuple(draw(st.lists(SOURCE, min_size=1, max_size=3)))
    each = st.tuples(*[SETTING] * len(sources))
    return Mix(
        draw(TEXT),
        sources,
        draw(st.none() | SOURCE),
        params(draw(st.dictionaries(TEXT, SETTING | each, max_size=3))),
    )


WORD = st.text(min_size=1, max_size=8)
DONORS = st.builds(TokenDonor, WORD | st.tuples(WORD, TEXT | st.integers(0, 9)), st.booleans()) | st.just(
    TokenDonor(None)
)
SPECS = st.builds(
    TokenizerSpec,
    WORD,
    st.dictionaries(WORD, DONORS, max_size=2).map(lambda d: tuple(d.items())),
    st.none() | st.integers(1, 64),
)


def recipes(stages):
    arithmetic = st.just({"policy": "float32", "dtype": "float32"}) | TEXT.map(
        lambda dtype: {"policy": "mergekit", "dtype": dtype}
    )
    return st.builds(
        lambda more, **fields: Recipe(**fields, **more),
        arithmetic,
        base=TEXT,
        layers=st.lists(mixes(), min_size=1, max_size=3).map(tuple),
        embeddings=mixes(),
        head=mixes(),
        out_dtype=TEXT,
        seed=st.integers(0, 2**63 - 1),
        tokenizer=st.none() | SPECS,
        chat_template=st.none() | TEXT,
        stages=stages,
    )


RECIPES = recipes(st.dictionaries(TEXT, recipes(st.just(())), max_size=2).map(lambda d: tuple(d.items())))

MIX = Mix(
    "ties",
    (("math", 0), ("code", 1)),
    ("base", 0),
    params({"weight": (0.1, Filtered((("mlp", 1 / 3), ("*", 1e-5)))), "lambda": 1.0}),
)
RECIPE = Recipe("base", (MIX, MIX), replace(MIX, sources=(("math", None), ("code", None))), MIX, seed=7)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(recipe=RECIPES)
def test_canonical_text_is_read_back_to_an_equal_recipe(recipe):
    back = Recipe.from_json(recipe.canonical())
    assert back == recipe
    assert hash(back) == hash(recipe)
    assert back.canonical() == recipe.canonical()
    assert back.id == recipe.id


@settings(max_examples=50, deadline=None, derandomize=True)
@given(one=RECIPES, two=RECIPES)
def test_recipes_have_one_text_if_and_only_if_they_are_equal(one, two):
    assert (one.canonical() == two.canonical()) == (one == two)


def test_canonical_text_is_json_in_one_form():
    text = RECIPE.canonical()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert "\n" not in text
    assert "1e-05" in text
    assert "0.3333333333333333" in text


def test_a_recipe_has_the_same_id_in_every_process():
    program = (
        "from evomerge.recipes.recipe import *\n"
        "cases = Filtered((('mlp', 1 / 3), ('*', 1e-5)))\n"
        "mix = Mix('ties', (('math', 0), ('code', 1)), ('base', 0), params({name: value for name, value in "
        "{('weight', (0.1, cases)), ('lambda', 1.0)}}))\n"
        "from dataclasses import replace\n"
        "print(Recipe('base', (mix, mix), replace(mix, sources=(('math', None), ('code', None))), mix, "
        "seed=7).id)\n"
    )
    ids = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1", "4242")
    }
    assert ids == {RECIPE.id}


def test_importing_recipes_imports_no_torch():
    heavy = "{'torch', 'numpy', 'transformers'}"
    program = f"import evomerge.recipes.recipe, sys; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_an_id_is_sixteen_hexadecimal_digits_of_the_text():
    import hashlib

    assert RECIPE.id == hashlib.sha256(RECIPE.canonical().encode()).hexdigest()[:16]
    assert len(RECIPE.id) == 16


CHANGES = {
    "base": {"base": "math"},
    "layers": {"layers": (MIX,)},
    "embeddings": {"embeddings": MIX},
    "head": {"head": replace(MIX, method="linear")},
    "dtype": {"dtype": "float64", "policy": "mergekit"},
    "the type of the inputs": {"dtype": STORED, "policy": "mergekit"},
    "policy": {"policy": "mergekit"},
    "out_dtype": {"out_dtype": "float32"},
    "seed": {"seed": 8},
    "tokenizer": {"tokenizer": TokenizerSpec("math")},
    "rows of a tokenizer": {"tokenizer": TokenizerSpec("math", pad_to_multiple_of=8)},
    "a token": {"tokenizer": TokenizerSpec("math", (("w", TokenDonor("zero")),))},
    "the order of tokens": {
        "tokenizer": TokenizerSpec("math", (("v", TokenDonor("zero")), ("w", TokenDonor("zero"))))
    },
    "the order of tokens turned": {
        "tokenizer": TokenizerSpec("math", (("w", TokenDonor("zero")), ("v", TokenDonor("zero"))))
    },
    "chat_template": {"chat_template": "auto"},
    "a stage": {"stages": (("one", Recipe("base", (MIX,), MIX, MIX)),)},
    "the name of a stage": {"stages": (("two", Recipe("base", (MIX,), MIX, MIX)),)},
    "two stages": {
        "stages": (("one", Recipe("base", (MIX,), MIX, MIX)), ("two", Recipe("base", (MIX,), MIX, MIX)))
    },
    "the order of stages": {
        "stages": (("two", Recipe("base", (MIX,), MIX, MIX)), ("one", Recipe("base", (MIX,), MIX, MIX)))
    },
    "a source": {"head": replace(MIX, sources=(("math", 0), ("code", 0)))},
    "the order of sources": {"head": replace(MIX, sources=MIX.sources[::-1])},
    "the base of a mix": {"head": replace(MIX, base=None)},
    "a number": {
        "head": replace(MIX, params=params(dict(MIX.params) | {"lambda": math.nextafter(1.0, 2.0)}))
    },
    "one number for two": {"head": replace(MIX, params=params({"weight": 0.5}))},
    "two numbers for one": {"head": replace(MIX, params=params({"weight": (0.5, 0.5)}))},
    "the order of filters": {
        "head": replace(MIX, params=params({"weight": (0.1, Filtered((("*", 1e-5), ("mlp", 1 / 3))))}))
    },
}


def test_every_change_changes_the_id():
    recipes = [RECIPE, *(replace(RECIPE, **change) for change in CHANGES.values())]
    assert len({r.id for r in recipes}) == len(set(recipes)) == len(recipes)


@pytest.mark.parametrize("value", [RECIPE, MIX, Filtered((("*", 1.0),))], ids=lambda v: type(v).__name__)
def test_values_are_frozen_hashable_and_without_a_dictionary(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
    assert not hasattr(value, "__dict__")
    assert hash(value) == hash(replace(value))
    assert replace(value) == value


# ---- equal numbers are one number


def with_weight(value) -> Recipe:
    return replace(RECIPE, head=replace(MIX, params=params({"weight": value})))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (0.0, -0.0),
        ((0.0, 1.0), (-0.0, 1.0)),
        (Filtered((("*", 0.0),)), Filtered((("*", -0.0),))),
        (1.0, 1),
        ((1.0, 2.0), (1, 2)),
        (1.0, True),
    ],
    ids=str,
)
def test_equal_recipes_have_one_text(one, two):
    assert with_weight(one) == with_weight(two)
    assert with_weight(one).canonical() == with_weight(two).canonical()


def test_minus_zero_in_a_text_is_zero():
    text = with_weight(0.0).canonical()
    minus = text.replace('"weight":0.0', '"weight":-0.0')
    assert minus != text
    assert Recipe.from_json(minus).id == with_weight(0.0).id


def test_a_setting_is_a_finite_float():
    assert [setting(v, "weight") for v in (True, False, 2, 0.5)] == [1.0, 0.0, 2.0, 0.5]
    assert math.copysign(1, setting(-0.0, "weight")) == 1
    assert all(type(setting(v, "weight")) is float for v in (True, 1, 0.5))
    for bad in (math.nan, math.inf, -math.inf, None, "1", [1], 10**400):
        with pytest.raises(RecipeError, match=r"^weight must be a finite number, got "):
            setting(bad, "weight")


# ---- what is not a recipe


def changed(**fields) -> str:
    return json.dumps(json.loads(RECIPE.canonical()) | fields)


def changed_head(**fields) -> str:
    data = json.loads(RECIPE.canonical())
    return json.dumps(data | {"head": data["head"] | {"params": {}} | fields})


BAD = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "text": '"recipe"',
    "no fields": "{}",
    "deep": "[" * 100_000,
    "no layers": changed(layers=[]),
    "layers null": changed(layers=None),
    "layers a text": changed(layers="abc"),
    "a layer null": changed(layers=[None]),
    "base null": changed(base=None),
    "base a number": changed(base=3),
    "seed a text": changed(seed="7"),
    "seed a fraction": changed(seed=0.5),
    "seed null": changed(seed=None),
    "dtype null": changed(dtype=None),
    "out_dtype a list": changed(out_dtype=["bfloat16"]),
    "an unknown field": changed(extra=1),
    "no method": changed_head(method=None),
    "no sources": changed_head(sources=[]),
    "sources a text": changed_head(sources="math"),
    "a source of one": changed_head(sources=[["math"]]),
    "a source of three": changed_head(sources=[["math", 1, 2]]),
    "a source without a name": changed_head(sources=[[None, 1]]),
    "a layer that is a text": changed_head(sources=[["math", "1"]]),
    "a layer that is a fraction": changed_head(sources=[["math", 0.5]]),
    "a layer below zero": changed_head(sources=[["math", -1]]),
    "base of a mix a text": changed_head(base="base"),
    "params a list": changed_head(params=[]),
    "params null": changed_head(params=None),
    "a parameter null": changed_head(params={"weight": None}),
    "a parameter that is a text": changed_head(params={"weight": "heavy"}),
    "a number in quotes": changed_head(params={"weight": "0.5"}),
    "NaN": changed_head(params={"weight": math.nan}),
    "infinity": changed_head(params={"weight": [1.0, math.inf]}),
    "NaN in a filter": changed_head(params={"weight": {"cases": [["mlp", math.nan]]}}),
    "numbers for other sources": changed_head(params={"weight": [1.0, 2.0, 3.0]}),
    "a filter without cases": changed_head(params={"weight": {}}),
    "a filter with no case": changed_head(params={"weight": {"cases": []}}),
    "a filter of numbers": changed_head(params={"weight": {"cases": [[1, 2]]}}),
    "a switch for a number": changed_head(params={"weight": True}),
    "a list in a list": changed_head(params={"weight": [[1.0], 2.0]}),
    "a number too large": '{"seed": 1' + "0" * 5000 + "}",
}


@pytest.mark.parametrize("name", BAD)
def test_any_other_text_is_a_recipe_error(name):
    with pytest.raises(RecipeError):
        Recipe.from_json(BAD[name])


def test_a_mix_says_what_it_lacks():
    with pytest.raises(RecipeError, match="a mix by 'ties' has no source models"):
        Mix("ties", ())
    with pytest.raises(RecipeError, match="weight has 3 values for 2 source models"):
        Mix("ties", (("a", 0), ("b", 0)), None, params({"weight": (1.0, 2.0, 3.0)}))
    with pytest.raises(RecipeError, match="at least one output layer"):
        Recipe("base", (), MIX, MIX)


# ---- small things


def test_a_filter_takes_the_first_text_in_the_name():
    value = Filtered((("layers.1.mlp", 0.1), ("mlp", 0.2), ("*", 0.3), ("attn", 0.4)))
    assert [value.at(n) for n in ("layers.1.mlp.up", "layers.2.mlp.up", "layers.1.attn")] == [0.1, 0.2, 0.3]
    assert Filtered((("mlp", 1.0),)).at("attn") is None
    assert Filtered((("", 1.0),)).at("anything") == 1.0
    assert (
        Filtered((("layers.1", 1.0), ("*", 2.0))).at("layers.10.mlp") == 1.0
    )  # a plain substring, as in mergekit


def test_models_are_named_once_in_order_of_use():
    assert MIX.models == ("math", "code", "base")
    recipe = Recipe(
        "shell",
        (Mix("passthrough", (("b", 0),)), Mix("passthrough", (("a", 0),))),
        Mix("passthrough", (("c", None),)),
        MIX,
    )
    assert recipe.models == ("c", "b", "a", "math", "code", "base", "shell")
    assert recipe.mixes == (recipe.embeddings, *recipe.layers, recipe.head)


def test_params_are_sorted_by_name():
    assert params({"weight": 1.0, "density": (0.5,), "lambda": 2.0}) == (
        ("density", (0.5,)),
        ("lambda", 2.0),
        ("weight", 1.0),
    )


# ---- what a recipe may not be


ARITHMETIC = {
    "another type under float32": (
        {"dtype": "bfloat16"},
        "in float32, got dtype 'bfloat16'; use the policy 'mergekit'",
    ),
    "the inputs' type under float32": ({"dtype": STORED}, "in float32, got dtype 'stored'"),
    "a policy that is none": (
        {"policy": "exact"},
        "unknown arithmetic policy 'exact'. Known: float32, mergekit",
    ),
    "a stage inside a stage": (
        {"stages": (("one", replace(RECIPE, stages=(("two", RECIPE),))),)},
        "no stages inside",
    ),
    "two stages of one name": ({"stages": (("one", RECIPE), ("one", RECIPE))}, "a name of its own"),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_what_no_recipe_can_be_is_refused_also_in_canonical_text(name):
    change, message = ARITHMETIC[name]
    with pytest.raises(RecipeError, match=re.escape(message)):
        replace(RECIPE, **change)
    plain = json.loads(RECIPE.canonical())
    stages = [[stage, json.loads(of.canonical())] for stage, of in change.get("stages", ())]
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.from_json(
            json.dumps(
                plain
                | {k: v for k, v in change.items() if k != "stages"}
                | ({"stages": stages} if stages else {})
            )
        )


def test_the_models_of_a_recipe_are_those_of_its_stages_too_and_no_stage():
    def of(*models: str, **fields) -> Recipe:
        mix = Mix("linear", tuple((m, 0) for m in models))
        return Recipe(models[0], (mix,), mix, mix, **fields)

    recipe = of(
        "one",
        "c",
        "two",
        stages=(("one", of("a", "b")), ("two", of("one", "d"))),
        tokenizer=TokenizerSpec("e"),
    )
    assert recipe.models == ("a", "b", "d", "c", "e")
    assert recipe.reads == ("one", "c", "two", "e")
