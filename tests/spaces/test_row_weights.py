"""Weights of rows as genes: what a gene moves, derivatives pulled back, and recipes by tensors as a start."""

from __future__ import annotations

import pytest

from evomerge.methods import method
from evomerge.recipes import PerRow, Recipe
from evomerge.spaces.row_weights import RowWeightSpace
from evomerge.spaces.tensor_weights import WEIGHT, TensorWeight, TensorWeightSpace

ROWS = (1, 3, 2, 2)


@pytest.fixture
def space() -> RowWeightSpace:
    axes = (
        TensorWeight("layers.0.norm.weight", "norm.weight", 0, False, "a"),
        TensorWeight("layers.0.q_norm.weight", "q_norm.weight", 0, False, "a"),
        TensorWeight("layers.1.up.weight", "up.weight", 1, False, "b"),
        TensorWeight("embed.weight", "embed.weight", None, False, "b"),
    )
    return RowWeightSpace(TensorWeightSpace(method("task_arithmetic"), "base", ("a", "b"), 2, axes), ROWS)


def weights(recipe: Recipe, axis: TensorWeight) -> tuple[float, ...]:
    """The weights of a tensor's rows, read from the recipe alone."""
    mix = recipe.embeddings if axis.layer is None else recipe.layers[axis.layer]
    value = dict(mix.params)[WEIGHT]
    assert isinstance(value, tuple)
    setting = value[("a", "b").index(axis.source)]
    assert isinstance(setting, PerRow)
    return setting.at(axis.tensor)


def test_each_gene_is_the_weight_of_its_row(space: RowWeightSpace) -> None:
    genome = [number / 8 for number in range(sum(ROWS))]
    recipe = space.decode(genome)
    assert [w for axis in space.coarse.axes for w in weights(recipe, axis)] == genome
    assert recipe.row_numbers == sum(ROWS)
    assert len(space.axes) == sum(ROWS)
    assert space.axes[2].name == "weight of a in layers.0.q_norm.weight, row 1"


def test_a_recipe_by_tensors_is_a_start_with_equal_rows(space: RowWeightSpace) -> None:
    coarse = space.coarse.decode([0.1, 0.2, 0.3, 0.4])
    genome = space.encode(coarse)
    assert genome == tuple(
        w for w, count in zip((0.1, 0.2, 0.3, 0.4), ROWS, strict=True) for _ in range(count)
    )
    assert space.coarse.encode(space.decode(genome)) is None, "a coarse space cannot hold rows"


def test_derivatives_go_to_the_genes_of_their_rows(space: RowWeightSpace) -> None:
    partials = {("layers.0.norm.weight", WEIGHT, "a"): 0.5, ("layers.0.norm.weight", "lambda", ""): 9.0}
    rows = {
        ("layers.1.up.weight", WEIGHT, "b"): (3.0, 4.0),
        ("layers.0.q_norm.weight", WEIGHT, "a"): (1.0, 2.0, 2.5),
    }
    assert space.pull_rows(partials, rows) == (0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 0.0, 0.0)
