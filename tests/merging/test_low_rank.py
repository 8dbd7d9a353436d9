"""Derivatives by the weights of LoRA adapters, from activations, against those from gradients of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.low_rank import LowRankTaskVectors, low_rank_task_vectors
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.model_loading import load_base
from evomerge.merging.parent_placement import place_parent
from evomerge.merging.weight_map import WeightMap
from evomerge.recipes import Mix, Recipe, params
from tests.support.lora_adapters import DOWN, HEAD, PREFIX, Q, V, adapter, noise, pair
from tests.support.tiny_models import LAYERS, build

IDS = torch.tensor([[(7 * i) % 60 + 3 for i in range(18)], [(11 * i) % 60 + 3 for i in range(18)]])


def parents(folder: Path) -> dict[str, Parent]:
    """A base, two adapters of it, and a model of its own."""
    paths = build(folder, torch.float32, ("base", "math"))
    base = Checkpoint(paths["base"])
    whole = f"{PREFIX}model.layers.2.mlp.up_proj.base_layer.weight"
    up = Checkpoint(paths["math"]).tensor("model.layers.2.mlp.up_proj.weight")
    a = adapter(folder / "a", {**pair(Q), **pair(DOWN, seed=3), **pair(HEAD, seed=4)})
    b = adapter(folder / "b", {**pair(Q, seed=5), **pair(V, seed=6), whole: up}, r=4, lora_alpha=4)
    return {
        "base": base,
        "a": AdaptedCheckpoint(base, a),
        "b": AdaptedCheckpoint(base, b),
        "other": Checkpoint(paths["math"]),
    }


def recipe(method: str, sources: tuple[str, ...] = ("a", "b"), **given: float) -> Recipe:
    weight = (0.7, 0.4, 0.1)[: len(sources)]

    def mix(layer: int | None) -> Mix:
        models = tuple((name, layer) for name in sources)
        return Mix(method, models, ("base", layer), params({"weight": weight, **given}))

    return Recipe("base", tuple(map(mix, range(LAYERS))), mix(None), mix(None), out_dtype="float32")


def partials(given: dict[str, Parent], one: Recipe, *, adds_up: bool) -> dict[tuple[str, str, str], float]:
    model: Any = load_base(given["base"], "float32")
    weights = WeightMap(model, given["base"].tensors)
    merge_into(one, given, weights)
    with CoefficientSlopes(Merge(one, given), weights, adds_up=adds_up) as slopes:
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
        (-logits.gather(-1, IDS[:, 1:, None]).double().mean()).backward()
    return slopes.partials


@pytest.mark.parametrize("adds_up", [True, False], ids=["added up", "one at a time"])
@pytest.mark.parametrize(
    ("method", "given"),
    [("task_arithmetic", {"lambda": 1.3}), ("dare_linear", {"normalize": 1.0, "density": 1.0})],
)
def test_derivatives_from_activations_are_those_from_gradients(
    method: str, given: dict[str, float], adds_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, one = parents(tmp_path), recipe(method, **given)
    multiplied: list[tuple[int, ...]] = []
    products = LowRankTaskVectors.products

    def spied(self: LowRankTaskVectors, inputs: torch.Tensor, gradients: torch.Tensor) -> list[float]:
        multiplied.append((gradients.shape[-1], inputs.shape[-1]))
        return products(self, inputs, gradients)

    monkeypatch.setattr(LowRankTaskVectors, "products", spied)
    found = partials(models, one, adds_up=adds_up)
    linear_layers = 7 * LAYERS + 1  # the head's too, without the one that an adapter replaces
    assert len(multiplied) == linear_layers - 1
    monkeypatch.setattr("evomerge.merging.coefficient_slopes.low_rank_task_vectors", lambda *_: None)
    wanted = partials(models, one, adds_up=adds_up)
    assert len(multiplied) == linear_layers - 1
    assert found.keys() == wanted.keys()
    adapted = [(f"{module}.weight", "weight", source) for module in (Q, DOWN, HEAD) for source in ("a", "b")]
    assert max(abs(wanted[key]) for key in adapted) > 1e-3
    size = max(map(abs, wanted.values()))
    for key, slope in wanted.items():
        assert found[key] == pytest.approx(slope, rel=1e-5, abs=1e-6 * size), key


def test_another_model_among_the_sources_takes_the_way_of_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = parents(tmp_path)

    def refused(*_: Any) -> list[float]:
        raise AssertionError("products of a model that is no adapter")

    monkeypatch.setattr(LowRankTaskVectors, "products", refused)
    assert partials(models, recipe("task_arithmetic", ("a", "other")), adds_up=False)
    assert partials(models, recipe("ties", density=0.5), adds_up=False)


def test_an_adapters_difference_is_found_wherever_the_parent_is_held(tmp_path: Path) -> None:
    models = parents(tmp_path)
    placed = {name: place_parent(parent, "device", "cpu") for name, parent in models.items()}
    merge = Merge(recipe("task_arithmetic"), placed)
    for step in merge.steps:
        found = low_rank_task_vectors(step, merge.parents, torch.device("cpu"))
        if ("up_proj" in step.name and ".2." in step.name) or len(step.info.shape) != 2:
            assert found is None
            continue
        assert found is not None
        base = models["base"].tensor(step.name)
        pairs = zip(found.left.split(found.ranks, 1), found.right.split(found.ranks, 1), strict=True)
        for name, (left, right) in zip(("a", "b"), pairs, strict=True):
            assert torch.allclose(left @ right.T, models[name].tensor(step.name) - base, atol=1e-6)


def test_products_are_those_of_the_whole_gradient() -> None:
    inputs, gradients = noise(9, 6, seed=1), noise(9, 5, seed=2)
    own = LowRankTaskVectors(noise(5, 3, seed=3), noise(6, 3, seed=4), (2, 0, 1))
    whole = gradients.double().T @ inputs.double()
    products = own.left.double().T @ whole @ own.right.double()
    wanted = [float(products[:2, :2].trace()), 0.0, float(products[2, 2])]
    assert own.products(inputs, gradients) == pytest.approx(wanted, rel=1e-5)
