"""Plans by shape of recipe give what a plan made anew gives, and refuse what that refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import EvomergeError
from evomerge.merging.merge import Merge
from evomerge.merging.merge_plan import MergePlans, shape_and_numbers
from evomerge.methods import METHODS, Values
from evomerge.recipes import Filtered, Mix, ParamValue, PerRow, Recipe, params
from evomerge.recipes.tokenizer_spec import TokenizerSpec
from tests.support.merge_cases import candidate


@pytest.fixture(scope="module")
def parents(tiny: dict[str, Path]) -> dict[str, Parent]:
    return {name: Checkpoint(path) for name, path in tiny.items()}


def with_params(recipe: Recipe, given: Mapping[str, ParamValue], layers: tuple[int, ...] = (2,)) -> Recipe:
    """The recipe with other parameters in some layers."""
    mixes = [
        replace(mix, params=params({**dict(mix.params), **given})) if i in layers else mix
        for i, mix in enumerate(recipe.layers)
    ]
    return replace(recipe, layers=tuple(mixes))


def values_said(mix: Mix, output: str, inputs: tuple[str, ...]) -> Values:
    """The values of a tensor, read from the mix's settings one by one."""
    found: dict[str, float | tuple[float, ...]] = {}
    for param in METHODS[mix.method].params:
        value = dict(mix.params).get(param.name, param.default)
        names = [output] if param.per == "merge" else inputs
        numbers = []
        for i, name in enumerate(names):
            setting = value[i] if isinstance(value, tuple) else value
            if isinstance(setting, PerRow):
                setting = setting.at(name)[0]
            elif isinstance(setting, Filtered):
                setting = setting.at(name)
            numbers.append(param.default if setting is None else setting)
        found[param.name] = numbers[0] if param.per == "merge" else tuple(numbers)
    return found


FILTERS = (Filtered((("q_proj", 0.25), ("mlp", 0.5))), Filtered((("mlp", 0.75), ("*", 0.1))), 0.6)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_a_known_shape_is_planned_as_if_it_were_the_first(
    method: str, parents: dict[str, Parent]
) -> None:
    plans = MergePlans(parents)
    recipes = [candidate(method, seed) for seed in range(3)]
    for param in METHODS[method].params:  # settings for some tensors, and none for others
        if param.per == "model" and not param.flag:
            recipes += [
                with_params(r, {param.name: FILTERS[: len(r.layers[0].sources)]}) for r in recipes[:2]
            ]
            break
    for recipe in recipes:
        merge, alone = Merge(recipe, parents, plans=plans), Merge(recipe, parents)
        assert merge.steps == alone.steps
        assert merge.plan is Merge(recipe, parents, plans=plans).plan
        for number, step in enumerate(merge.steps):
            if step.mix is not None:
                assert merge.values.of(number) == values_said(step.mix, step.name, step.inputs)


def test_values_by_row_count_by_their_first_where_a_method_asks_for_one(parents: dict[str, Parent]) -> None:
    rows = PerRow((("q_proj", tuple(0.1 * i for i in range(1, 33))), ("norm", (0.5,))), 0.75)
    plain = candidate("task_arithmetic")
    recipe = with_params(plain, {"weight": (rows, 0.2, 0.3)}, (1,))
    shapes = {step.name: step.info.shape for step in Merge(plain, parents).steps}
    (name,) = [n for n in shapes if n.endswith("layers.1.self_attn.q_proj.weight")]
    rows = PerRow((("q_proj", tuple(0.1 * i for i in range(1, shapes[name][0] + 1))), *rows.cases[1:]), 0.75)
    recipe = with_params(plain, {"weight": (rows, 0.2, 0.3)}, (1,))
    plans = MergePlans(parents)
    for one in (recipe, recipe):
        merge = Merge(one, parents, plans=plans)
        for number, step in enumerate(merge.steps):
            if step.mix is not None:
                assert merge.values.of(number) == values_said(step.mix, step.name, step.inputs)


def test_numbers_and_seeds_share_a_plan_and_nothing_else_does() -> None:
    recipe = candidate("ties")
    shape, numbers = shape_and_numbers(recipe)
    assert shape_and_numbers(candidate("ties", 1))[0] == shape
    assert shape_and_numbers(replace(recipe, seed=9)) == (shape, numbers)
    mix = recipe.layers[1]
    others = [
        replace(recipe, base="math"),
        replace(recipe, out_dtype="float32"),
        replace(recipe, policy="mergekit", dtype="bfloat16"),
        replace(recipe, tokenizer=TokenizerSpec("union")),
        replace(recipe, layers=recipe.layers[:-1]),
        replace(recipe, head=replace(recipe.head, method="breadcrumbs")),
        replace(recipe, layers=(replace(mix, sources=mix.sources[::-1]), *recipe.layers[1:])),
        replace(recipe, layers=(replace(mix, base=("base", 2)), *recipe.layers[1:])),
        with_params(recipe, {"weight": (0.1, 0.2, 0.3)}),
        with_params(recipe, {"weight": 0.1}),
        with_params(recipe, {"weight": (Filtered((("q_proj", 0.1), ("*", 0.2))), 0.2, 0.3)}),
        with_params(recipe, {"weight": (PerRow((("q_proj", (0.1, 0.2)),), 0.2), 0.2, 0.3)}),
        with_params(recipe, {"weight": (PerRow((("q_proj", (0.1, 0.2, 0.3)),), 0.2), 0.2, 0.3)}),
    ]
    shapes = [shape, *(shape_and_numbers(other)[0] for other in others)]
    assert len(set(shapes)) == len(shapes)


REFUSED: dict[str, dict[str, ParamValue]] = {
    "a density above 1": {"density": (0.5, 1.5, 0.5)},
    "a density below 0 for some tensors": {"density": (0.5, Filtered((("mlp", -0.5), ("*", 0.5))), 0.5)},
    "a switch that is neither on nor off": {"normalize": 0.5},
    "a factor that is not finite": {"lambda": float("inf")},
    "a weight that is none": {"weight": (0.1, float("nan"), 0.2)},
    "a parameter of another method": {"gamma": 0.1},
    "one value for each model of the merge's own": {"lambda": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_refused_by_the_same_words_when_the_shape_is_known(
    given: dict[str, ParamValue], parents: dict[str, Parent]
) -> None:
    legal: dict[str, ParamValue] = {
        "density": (0.5, Filtered((("mlp", 0.5), ("*", 0.4))) if "Filtered" in str(given) else 0.5, 0.5),
        "normalize": 1.0,
        "lambda": 1.0,
        "weight": (0.1, 0.2, 0.2),
    }
    recipe = with_params(candidate("ties"), legal)
    refused = with_params(recipe, given)
    plans = MergePlans(parents)
    Merge(recipe, parents, plans=plans)
    with pytest.raises(EvomergeError) as expected:
        Merge(refused, parents)
    with pytest.raises(EvomergeError) as found:
        Merge(refused, parents, plans=plans)
    assert str(found.value) == str(expected.value)
    assert type(found.value) is type(expected.value)
    assert Merge(recipe, parents, plans=plans).steps


class Closed:
    """A parent that may not be looked at any more."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"'{name}' of a parent is read for a shape that is known")


def test_a_known_shape_is_planned_without_a_look_at_the_parents(parents: dict[str, Parent]) -> None:
    shared: dict[str, Parent] = dict(parents)
    plans = MergePlans(shared)
    merge = Merge(candidate("dare_ties", 0), shared, plans=plans)
    shared |= {name: Closed() for name in shared}  # type: ignore[misc]
    second = Merge(candidate("dare_ties", 1), shared, plans=plans)
    assert second.plan is merge.plan


def test_a_recipe_with_intermediate_merges_is_planned_anew(parents: dict[str, Parent]) -> None:
    inner = candidate("linear")
    mixes = [replace(mix, sources=(("half", mix.sources[0][1]), *mix.sources[1:])) for mix in inner.mixes]
    outer = replace(inner, embeddings=mixes[0], layers=tuple(mixes[1:-1]), head=mixes[-1])
    plans = MergePlans({**parents, "half": parents["chat"]})
    Merge(outer, plans.parents, plans=plans)  # of the same shape, but for what 'half' is
    one = Merge(replace(outer, stages=(("half", inner),)), plans.parents, plans=plans)
    two = Merge(replace(outer, stages=(("half", candidate("linear", 2)),)), plans.parents, plans=plans)
    assert one.plan is not two.plan
    assert one.parents["half"] is not two.parents["half"]
    assert plans.find(outer) is not None


def test_the_longest_unused_shape_is_forgotten(
    parents: dict[str, Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.merging.merge_plan._MOST_PLANS", 2)
    plans = MergePlans(parents)
    recipes = {dtype: replace(candidate("linear"), out_dtype=dtype) for dtype in ("float32", "bfloat16")}
    first = Merge(recipes["float32"], parents, plans=plans).plan
    Merge(recipes["bfloat16"], parents, plans=plans)
    assert Merge(recipes["float32"], parents, plans=plans).plan is first
    Merge(candidate("slerp"), parents, plans=plans)
    assert plans.find(recipes["bfloat16"]) is None
    assert Merge(recipes["float32"], parents, plans=plans).plan is first
