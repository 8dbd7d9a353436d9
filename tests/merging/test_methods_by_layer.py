"""A merge by several methods: every tensor is the one that its own method makes, also through stages of one
method each and through mergekit's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.errors import RecipeError
from evomerge.merging import merge
from evomerge.merging.merge_plan import MergePlans
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import METHODS
from evomerge.recipes import Mix, Recipe, TokenizerSpec, params
from evomerge.recipes.mergekit_yaml import by_method, dump, load, with_outer_filters
from tests.support.merge_cases import assert_equal, candidate, live

OTHERS = [name for name in METHODS if name != "ties"]
DEPTH = 4


def mixed(name: str) -> Recipe:
    """TIES in layers 0 and 3 and the head, another method in layers 1 and 2 and the embeddings."""
    ties, other = candidate("ties"), candidate(name)
    layers = (ties.layers[0], *other.layers[1:3], ties.layers[3])
    return replace(ties, layers=layers, embeddings=other.embeddings)


@pytest.fixture(scope="module")
def parents(tiny: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint(path) for name, path in tiny.items()}


@pytest.fixture(scope="module")
def by_ties(parents: dict[str, Checkpoint]) -> dict[str, torch.Tensor]:
    return dict(merge.merged_tensors(candidate("ties"), parents))


@pytest.fixture(scope="module")
def resident(tiny: dict[str, Path]) -> WeightMap:
    return live(tiny["base"])


@pytest.fixture(scope="module")
def plans(parents: dict[str, Checkpoint]) -> MergePlans:
    """As a search keeps them: other methods were merged before into the same model."""
    return MergePlans(parents)


def read_again(text: str, parents: Mapping[str, Checkpoint]) -> Recipe:
    return load(
        _yaml.parse_all(text, "recipe.yaml"),
        lambda name: parents[name].layout.num_layers,
        lambda name: "bfloat16",
    )


@pytest.mark.parametrize("name", OTHERS)
def test_each_tensor_is_its_own_methods_and_survives_stages_yaml_and_the_live_model(
    name: str,
    parents: dict[str, Checkpoint],
    by_ties: dict[str, torch.Tensor],
    resident: WeightMap,
    plans: MergePlans,
) -> None:
    recipe, layout = mixed(name), parents["base"].layout
    by_other = dict(merge.merged_tensors(candidate(name), parents))
    wanted = {}
    for tensor in by_ties:
        place = layout.place(tensor)
        is_other = place.part == "embeddings" or place.layer in (1, 2)
        wanted[tensor] = (by_other if is_other else by_ties)[tensor]
    assert_equal(dict(merge.merged_tensors(recipe, parents)), wanted)
    divided = by_method(recipe)
    assert [stage for stage, _ in divided.stages] == [f"merge-{name}", "merge-ties"]
    assert all(len({mix.method for mix in part.mixes}) == 1 for _, part in divided.stages)
    assert_equal(dict(merge.merged_tensors(divided, parents)), wanted)
    named = with_outer_filters(recipe, layout.outer_names("embeddings"), layout.outer_names("head"))
    written = read_again(dump(named, {model: model for model in parents}), parents)
    assert_equal(dict(merge.merged_tensors(written, parents)), wanted)
    merge.merge_into(recipe, parents, resident, plans=plans)
    resident.verify(wanted.__getitem__)


def test_a_sum_beside_an_average_is_what_is_computed_by_hand(parents: dict[str, Checkpoint]) -> None:
    """In float64, from the definitions: base + sum of w (x - base), and sum of w x / sum of w."""
    weights = {"math": 0.7, "code": 0.4}

    def mix(method: str, layer: int | None) -> Mix:
        sources = tuple((model, layer) for model in weights)
        base = ("base", layer) if method == "task_arithmetic" else None
        return Mix(method, sources, base, params({"weight": tuple(weights.values())}))

    methods = ("task_arithmetic", "linear", "linear", "task_arithmetic")
    recipe = Recipe(
        "base",
        tuple(mix(method, layer) for layer, method in enumerate(methods)),
        mix("linear", None),
        mix("task_arithmetic", None),
        out_dtype="float32",
    )
    layout = parents["base"].layout
    for name, tensor in merge.merged_tensors(recipe, parents):
        place = layout.place(name)
        averaged = place.part == "embeddings" or place.layer in (1, 2)
        base = parents["base"].tensor(name).double()
        models = {model: parents[model].tensor(name).double() for model in weights}
        if averaged:
            wanted = sum(w * models[m] for m, w in weights.items()) / sum(weights.values())
        else:
            wanted = base + sum(w * (models[m] - base) for m, w in weights.items())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_recipe_of_one_method_stays_what_it_is() -> None:
    recipe = candidate("ties")
    assert by_method(recipe) == recipe


def test_layers_passed_through_in_place_need_no_stage(parents: dict[str, Checkpoint]) -> None:
    ties = candidate("ties")
    taken = Mix("passthrough", (("code", 1),))
    recipe = replace(
        ties,
        layers=(ties.layers[0], taken, *ties.layers[2:]),
        embeddings=Mix("passthrough", (("math", None),)),
    )
    divided = by_method(recipe)
    assert [name for name, _ in divided.stages] == ["merge-ties"]
    assert divided.layers[1] == taken
    assert_equal(dict(merge.merged_tensors(divided, parents)), dict(merge.merged_tensors(recipe, parents)))


def test_a_merge_by_several_methods_that_a_route_reads_has_documents_of_its_own(
    parents: dict[str, Checkpoint],
) -> None:
    outer = Mix("passthrough", (("merged", None),))
    layers = tuple(Mix("passthrough", (("merged", layer),)) for layer in (0, 1, 1, 3))
    route = Recipe("base", layers, outer, outer, stages=(("merged", mixed("linear")),))
    divided = by_method(route)
    assert [name for name, _ in divided.stages] == ["merged-linear", "merged-ties", "merged"]
    assert_equal(dict(merge.merged_tensors(divided, parents)), dict(merge.merged_tensors(route, parents)))


def test_names_of_stages_are_no_models_names() -> None:
    recipe = mixed("linear")
    renamed = Recipe.from_json(recipe.canonical().replace('"code"', '"merge-ties"'))
    assert [name for name, _ in by_method(renamed).stages] == ["merge-linear", "merge-ties-"]


def test_what_several_documents_cannot_say_is_refused() -> None:
    recipe = mixed("linear")
    with pytest.raises(RecipeError, match="one method, this recipe has linear, ties, and a tokenizer"):
        by_method(replace(recipe, tokenizer=TokenizerSpec("union")))
    moved = (*recipe.layers[:3], Mix("passthrough", (("code", 1),)))
    with pytest.raises(RecipeError, match="passes layers through in another order"):
        by_method(replace(recipe, layers=moved))
