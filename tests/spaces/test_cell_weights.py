"""Weights of cells as genes: what a gene moves, and derivatives pulled back through it."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.recipes import Filtered, Mix
from evomerge.spaces import Range
from evomerge.spaces.cell_weights import CellWeightSpace, cells_of
from tests.support.toy import weight_space

MODELS = ("a", "b")
TENSORS = {
    "embed": (None, "other", "embeddings"),
    "layers.0.self_attn.q": (0, "attention", "layer"),
    "layers.1.mlp.up": (1, "mlp", "layer"),
    "layers.2.mlp.up": (2, "mlp", "layer"),
    "layers.2.norm": (2, "other", "layer"),
    "head": (None, "other", "head"),
}


@pytest.fixture
def space() -> CellWeightSpace:
    cells = weight_space("task_arithmetic", MODELS, ranges={"weight": Range(-10.0, 10.0, 1.0)})
    places = {
        name: cells_of(cells, layer, component, part) for name, (layer, component, part) in TENSORS.items()
    }
    return CellWeightSpace(cells, places)


def weights(space: CellWeightSpace, genome: list[float]) -> dict[tuple[str, str], float]:
    """(tensor, model) -> its weight in the recipe of a genome, read from the recipe alone."""
    recipe = space.decode(genome)
    found = {}
    for tensor, (layer, _, part) in TENSORS.items():
        mix: Mix = recipe.head if part == "head" else recipe.embeddings
        if layer is not None:
            mix = recipe.layers[layer]
        values = dict(mix.params)["weight"]
        assert isinstance(values, tuple)
        for (model, _), value in zip(mix.sources, values, strict=True):
            number = value.at(tensor) if isinstance(value, Filtered) else value
            assert number is not None
            found[tensor, model] = number
    return found


def test_pulled_derivatives_are_central_differences_of_any_linear_function(space: CellWeightSpace) -> None:
    generator = np.random.default_rng(0)
    partials = {(t, "weight", m): float(generator.standard_normal()) for t in TENSORS for m in MODELS}
    genome = [round(float(g), 2) for g in generator.uniform(-1, 2, len(space.axes))]
    pulled = space.pull(partials | {("embed", "lambda", ""): 7.0, ("unknown", "weight", "a"): 7.0})

    def function(point: list[float]) -> float:
        found = weights(space, point)
        return sum(slope * found[tensor, model] for (tensor, _, model), slope in partials.items())

    assert len(pulled) == len(genome)
    for place in range(len(genome)):
        ends = []
        for step in (0.5, -0.5):
            moved = list(genome)
            moved[place] += step
            ends.append(function(moved))
        assert pulled[place] == pytest.approx(ends[0] - ends[1], rel=1e-3, abs=1e-3), space.axes[place].name


def test_a_gene_is_the_weight_of_its_cell(space: CellWeightSpace) -> None:
    for place, axis in enumerate(space.axes):
        genome = [1.0] * len(space.axes)
        genome[place] = -0.25
        moved = {key for key, value in weights(space, genome).items() if value != 1.0}
        assert moved <= {(t, axis.source) for t in TENSORS}
        assert space.encode(space.decode(genome)) == tuple(genome)


def test_a_weight_beyond_all_reason_is_held_at_the_bound(space: CellWeightSpace) -> None:
    genome = [1e6] * len(space.axes)
    assert set(weights(space, genome).values()) == {10.0}
