"""Laws that every search space obeys: genomes of its own and of no other kind, recipes that can be merged."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evomerge import spaces
from evomerge.merging import tensor_plan
from evomerge.methods import METHODS, method
from evomerge.recipes import Mix, Recipe, params
from evomerge.spaces import MethodChoiceSpace, Range, RouteWeightSpace, SearchSpace
from evomerge.spaces.cell_weights import CellWeightSpace
from evomerge.spaces.routes import LayerIndicatorSpace, LayerPool, PositionChoiceSpace
from evomerge.spaces.routes.relaxation import RelaxedRouteSpace
from evomerge.spaces.row_weights import RowWeightSpace
from evomerge.spaces.tensor_weights import TensorWeight, TensorWeightSpace
from tests.support.toy import weight_space

POOL = LayerPool((("a", 6), ("b", 4), ("c", 9)), "a")
SMALL_POOL = LayerPool((("b", 2), ("a", 3)), "a")
ROUTE = Recipe(
    "base",
    tuple(Mix("passthrough", ((model, layer),)) for model, layer in (("a", 0), ("b", 0), ("a", 1), ("b", 1))),
    *[Mix("passthrough", (("base", None),))] * 2,
    out_dtype="float32",
)
FOREIGN = Recipe(
    "nobody",
    (Mix("linear", (("nobody", 0), ("none", 3)), None, params({"weight": (0.3, 0.7)})),),
    *[Mix("passthrough", (("nobody", None),))] * 2,
    out_dtype="float32",
)


DENSITY = Range(0.1, 1.0, 0.5)
DEAD = frozenset({("layer 2", component, "a") for component in ("attention", "mlp")})


def weight_spaces() -> dict[str, SearchSpace]:
    """A space over each method that has numbers, every one of them searched."""
    found: dict[str, SearchSpace] = {}
    for name in METHODS:
        ranges = {
            p.name: Range(p.low, p.high, round(p.low + 0.4 * (p.high - p.low), 4))
            for p in method(name).params
            if not p.flag
        }
        if ranges:
            models = ("a", "b", "c")[: method(name).models[1]]
            found[f"weights, {name}"] = weight_space(name, models, ranges=ranges)
    return found


SPACES: dict[str, SearchSpace] = weight_spaces() | {
    "a method for each group": MethodChoiceSpace(
        (
            weight_space("task_arithmetic"),
            weight_space("dare_ties", ranges={"weight": Range(-0.5, 2.0, 0.5), "density": DENSITY}, seed=3),
            weight_space("linear", ranges={"weight": Range(0.0, 1.0, 0.5)}),
        )
    ),
    "a method for each group, of some": MethodChoiceSpace(
        tuple(
            weight_space(name, ("a",), ranges=ranges, embeddings=False, dead=DEAD, searchable=False)
            for name, ranges in (("arcee_fusion", {}), ("ties", {"density": DENSITY}), ("slerp", {}))
        )
    ),
    "indicators": LayerIndicatorSpace(POOL, scales="none"),
    "indicators, a scale a hop": LayerIndicatorSpace(POOL, scales="hop"),
    "indicators, a matrix of scales": LayerIndicatorSpace(SMALL_POOL, scales="matrix"),
    "choices": PositionChoiceSpace(POOL, scales="none"),
    "choices, a scale a hop": PositionChoiceSpace(POOL, spans=(1, 2, 3), scales="hop"),
    "choices as categories": PositionChoiceSpace(POOL, spans=(1, 2), scales="hop", categorical=True),
    "a weight for each tensor": TensorWeightSpace(
        method("task_arithmetic"),
        "base",
        ("a", "b"),
        2,
        (
            TensorWeight("model.layers.0.norm.weight", "norm.weight", 0, False, "a"),
            TensorWeight("model.layers.0.q_norm.weight", "q_norm.weight", 0, False, "a"),
            TensorWeight("model.layers.0.norm.weight", "norm.weight", 0, False, "b"),
            TensorWeight("model.layers.1.mlp.up.weight", "mlp.up.weight", 1, False, "b"),
            TensorWeight("model.embed.weight", "model.embed.weight", None, False, "a"),
            TensorWeight("lm_head.weight", "lm_head.weight", None, True, "b"),
        ),
        (("lambda", 0.9),),
    ),
    "a weight for each row": RowWeightSpace(
        TensorWeightSpace(
            method("task_arithmetic"),
            "base",
            ("a", "b"),
            2,
            (
                TensorWeight("model.layers.0.norm.weight", "norm.weight", 0, False, "a"),
                TensorWeight("model.layers.0.q_norm.weight", "q_norm.weight", 0, False, "a"),
                TensorWeight("model.layers.1.mlp.up.weight", "mlp.up.weight", 1, False, "b"),
                TensorWeight("lm_head.weight", "lm_head.weight", None, True, "b"),
            ),
        ),
        (1, 3, 4, 2),
    ),
    "a weight for each cell": CellWeightSpace(
        weight_space("task_arithmetic", ("a", "b"), ranges={"weight": Range(-10.0, 10.0, 1.0)}), {}
    ),
    "shares of models at each depth": RelaxedRouteSpace("base", ("a", "b", "c"), 4, {}),
    "shares, embeddings and head given": RelaxedRouteSpace("base", ("a", "b"), 3, {}, outer="a"),
    "weights on a route": RouteWeightSpace(ROUTE, "base", ("a", "b"), groups=3),
}
each = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def genomes(space: Any, count: int = 20) -> list[list[float]]:
    """Genomes near the start and far from it: categories first, where the space has any, then numbers."""
    generator = np.random.default_rng(3)
    categories: Sequence[int] = getattr(space, "categories", ())
    found = []
    for number in range(count):
        choices = [float(generator.integers(k)) for k in categories]
        width = (0.1, 1.0, 4.0)[number % 3]
        found.append([*choices, *(width * generator.standard_normal(len(space.axes) - len(choices)))])
    return found


def test_every_space_of_the_package_is_swept() -> None:
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(spaces.__path__, "evomerge.spaces.")
    ]
    classes = {
        value
        for module in modules
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__.startswith("evomerge.spaces")
        and {"decode", "encode", "start"} <= set(dir(value))
        and value is not SearchSpace
    }
    assert classes == {type(space) for space in SPACES.values()}


@each
def test_axes_have_names_of_their_own_and_the_start_a_gene_for_each(space: SearchSpace) -> None:
    names = [axis.name for axis in space.axes]
    assert len(set(names)) == len(names) == len(space.start) > 0
    assert all(map(math.isfinite, space.start))


@each
def test_a_genome_is_one_recipe_that_can_be_merged_and_written_down(space: SearchSpace) -> None:
    for genome in [list(space.start), *genomes(space)]:
        recipe = space.decode(genome)
        assert space.decode(tuple(genome)) == recipe
        tensor_plan.check(recipe)
        again = Recipe.from_json(recipe.canonical())
        assert (again, again.id) == (recipe, recipe.id)


@each
def test_a_recipe_that_has_a_genome_comes_back_from_it(space: SearchSpace) -> None:
    start = space.decode(space.start)
    held = space.encode(start)
    assert held is not None
    assert space.decode(held) == start
    for number, genome in enumerate(genomes(space)):
        recipe = space.decode(genome)
        back = space.encode(recipe)
        if back is None:
            continue
        nearest = space.decode(back)
        again = space.encode(nearest)
        assert again is not None
        assert space.decode(again) == nearest
        if number % 3 == 0:  # near the start, where no value is at a bound
            assert nearest == recipe


@each
def test_every_gene_but_the_first_hops_scale_changes_some_recipe(space: SearchSpace) -> None:
    categories: Sequence[int] = getattr(space, "categories", ())
    bases = [list(space.start), *genomes(space, 60)]
    few = len(categories)
    bases += [[*g[:few], *(gene - 1 for gene in g[few:])] for g in genomes(space, 60)]  # shorter routes
    unused = []
    for place, axis in enumerate(space.axes):
        values = range(categories[place]) if place < len(categories) else (-2.0, -0.5, 0.5, 2.0)
        if not any(
            space.decode([*base[:place], float(value), *base[place + 1 :]]) != space.decode(base)
            for base in bases
            for value in values
        ):
            unused.append(axis.name)
    # the scale before the first hop is 1 on every route
    assert [name for name in unused if not name.startswith("scale before layer 0")] == []
    assert len(unused) <= 1


@each
@pytest.mark.parametrize("fault", ["none", "one less", "one more", "NaN", "infinite"])
def test_what_is_no_genome_is_refused(space: SearchSpace, fault: str) -> None:
    genome = list(space.start)
    bad = {
        "none": [],
        "one less": genome[:-1],
        "one more": [*genome, 0.0],
        "NaN": [*genome[:-1], math.nan],
        "infinite": [*genome[:-1], math.inf],
    }[fault]
    with pytest.raises(ValueError, match=f"{len(genome)} finite numbers"):
        space.decode(bad)


@each
def test_a_recipe_of_other_models_has_no_genome(space: SearchSpace) -> None:
    assert space.encode(FOREIGN) is None
