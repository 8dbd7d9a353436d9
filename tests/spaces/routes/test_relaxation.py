"""Relaxed routes: shares that add up to 1, derivatives against central differences, the route they end at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from evomerge.recipes import Recipe
from evomerge.spaces.routes.relaxation import RelaxedRouteSpace

MODELS = ("a", "b", "c")
DEPTH = 3
PLACES: dict[str, int | None] = {
    "embed": None,
    "head": None,
    **{f"layers.{layer}.{part}": layer for layer in range(DEPTH) for part in ("up", "down")},
}
FREE = RelaxedRouteSpace("a", MODELS, DEPTH, PLACES)
FIXED = RelaxedRouteSpace("a", MODELS, DEPTH, PLACES, outer="b")


def weights(recipe: Recipe) -> list[tuple[float, ...]]:
    """The weights of every mix: embeddings, layers, head."""
    return [dict(mix.params)["weight"] for mix in recipe.mixes]  # type: ignore[misc]


def genome(space: RelaxedRouteSpace, seed: int = 0, width: float = 1.0) -> tuple[float, ...]:
    values = width * np.random.default_rng(seed).standard_normal(len(space.axes))
    return tuple(map(float, values))


def partials(seed: int = 1) -> dict[tuple[str, str, str], float]:
    """A derivative for each tensor and model."""
    generator = np.random.default_rng(seed)
    return {
        (tensor, "weight", model): float(generator.standard_normal()) for tensor in PLACES for model in MODELS
    }


def linear_loss(
    genes: Sequence[float], temperature: float, slopes: dict[tuple[str, str, str], float], outer: bool
) -> float:
    """sum of slope x share, by a softmax of its own in float64: the loss whose partials `slopes` are."""
    total = 0.0
    shares = []
    for first in range(0, len(genes), len(MODELS)):
        powers = np.exp(np.array(genes[first : first + len(MODELS)]) / temperature)
        shares.append(powers / powers.sum())
    for (tensor, _, model), slope in slopes.items():
        layer = PLACES[tensor]
        if layer is None and not outer:
            continue
        place = 0 if layer is None else layer + outer
        total += slope * shares[place][MODELS.index(model)]
    return float(total)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("space", [FREE, FIXED], ids=["embeddings a choice", "embeddings given"])
def test_pulled_derivatives_are_central_differences(space: RelaxedRouteSpace, temperature: float) -> None:
    point, slopes = genome(space, width=0.3), partials()
    at = replace(space, temperature=temperature, point=point)
    found = at.pull(slopes)
    assert len(found) == len(space.axes)
    for gene in range(len(point)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = [*point[:gene], point[gene] + step, *point[gene + 1 :]]
            ends.append(linear_loss(moved, temperature, slopes, outer=space.outer is None))
        assert found[gene] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_softmax_to_four_decimals_and_add_up_to_one(seed: int) -> None:
    temperature = (1.0, 0.5, 0.2)[seed % 3]
    space = replace(FREE, temperature=temperature)
    genes = genome(space, seed, width=(0.1, 1.0, 5.0)[seed % 3])
    recipe = space.decode(genes)
    found = [weights(recipe)[0], *weights(recipe)[1:-1]]
    for place, shares in enumerate(found):
        assert sum(round(share * 10**4) for share in shares) == 10**4
        assert all(share == round(share, 4) for share in shares)
        powers = np.exp(np.array(genes[3 * place : 3 * place + 3]) / temperature)
        assert shares == pytest.approx(powers / powers.sum(), abs=1.01e-4)
    assert weights(recipe)[0] == weights(recipe)[-1], "embeddings and head are one choice"
    assert [mix.sources for mix in recipe.layers] == [
        tuple((model, layer) for model in MODELS) for layer in range(DEPTH)
    ]


def test_the_start_is_the_average_and_the_coldest_genome_nearly_the_route() -> None:
    assert weights(FREE.decode(FREE.start)) == [(0.3334, 0.3333, 0.3333)] * (DEPTH + 2)
    genes = [0.0] * len(FREE.axes)
    for place, model in enumerate((2, 0, 1, 0)):
        genes[3 * place + model] = 3.0
    assert FREE.route(genes) == ("c", (("a", 0), ("b", 1), ("a", 2)))
    cold = replace(FREE, temperature=0.2).decode(genes)
    assert weights(cold)[1:-1] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
    assert FREE.route(FREE.start) == ("a", (("a", 0), ("a", 1), ("a", 2))), "of equal shares the first"
    assert FIXED.route([5.0, 0, 0, 0, 5.0, 0, 0, 0, 0])[0] == "b"


def test_embeddings_are_settled_in_the_first_quarter_and_layers_after_it() -> None:
    steps, point, slopes = 12, genome(FREE, width=0.4), partials()
    temperatures = []
    for step in range(steps):
        at = FREE.at_step(step, steps, point)
        temperatures.append(at.temperature)
        pulled = at.pull(slopes)
        outer, layers = pulled[:3], pulled[3:]
        moves_outer = step < steps // 4
        assert any(outer) == moves_outer
        assert any(layers) != moves_outer
        ends = weights(at.decode(point))[0]
        assert (sorted(ends) == [0.0, 0.0, 1.0]) != moves_outer
        if not moves_outer:
            assert MODELS[ends.index(1.0)] == FREE.route(point)[0]
    for first, last in ((0, steps // 4 - 1), (steps // 4, steps - 1)):
        assert temperatures[first] == 1.0
        assert temperatures[last] == pytest.approx(0.2)
        ratios = [b / a for a, b in zip(temperatures[first:last], temperatures[first + 1 :], strict=False)]
        assert max(ratios) == pytest.approx(min(ratios))
    assert all(FIXED.at_step(step, steps, point[3:]).moving != "outer" for step in range(steps))


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_descent_of_few_steps_has_a_space_at_each(steps: int) -> None:
    for step in range(steps):
        at = FREE.at_step(step, steps, FREE.start)
        assert math.isfinite(at.temperature)
        assert 0.2 <= at.temperature <= 1.0
        assert at.decode(FREE.start).base == "a"
