"""Derivatives of a live model's loss by the coefficients of its merge, against central differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import CandidateError
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.model_loading import load_base
from evomerge.merging.weight_map import WeightMap
from evomerge.recipes import Filtered, Mix, Recipe, params
from tests.support.text_architectures import VOCABULARY, build

STEP = 1e-4
IDS = torch.tensor([[(7 * i) % 60 + 3 for i in range(18)], [(11 * i) % 60 + 3 for i in range(18)]])


def recipe(depth: int, weights: dict[str, float] | None = None, name: str = "task_arithmetic") -> Recipe:
    """A sum of two task vectors; tensors that are named have other weights of `a`."""
    of_a = Filtered((*(weights or {}).items(), ("*", 0.4)))
    given = params({"weight": (of_a, 0.3)})

    def mix(layer: int | None) -> Mix:
        return Mix(name, (("a", layer), ("b", layer)), ("base", layer), given)

    return Recipe("base", tuple(mix(i) for i in range(depth)), mix(None), mix(None), out_dtype="float32")


def loss(model: Any) -> torch.Tensor:
    """Minus the log-probability of a text."""
    logits = model(input_ids=IDS % VOCABULARY, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, (IDS % VOCABULARY)[:, 1:, None]).double().mean()


def family(folder: Path, architecture: str) -> dict[str, Parent]:
    """Three models of an architecture: a base and two that differ from it."""
    found: dict[str, Parent] = {}
    for number, name in enumerate(("base", "a", "b")):
        model = build(architecture).float()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * (number > 0) * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        found[name] = Checkpoint(folder / name)
    return found


def merged_loss(parents: dict[str, Parent], one: Recipe, model: Any, weights: WeightMap) -> float:
    merge_into(one, parents, weights)
    with torch.no_grad():
        return float(loss(model))


def differences(
    parents: dict[str, Parent], names: Sequence[str], model: Any, weights: WeightMap
) -> dict[str, float]:
    """Tensor -> the derivative by `a`'s weight of it, by central differences of the model's own loss."""
    depth = parents["base"].layout.num_layers
    found = {}
    for name in names:
        ends = [
            merged_loss(parents, recipe(depth, {name: 0.4 + step}), model, weights)
            for step in (STEP * 50, -STEP * 50)
        ]
        found[name] = (ends[0] - ends[1]) / (100 * STEP)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2"])
def test_partials_are_the_models_own_differences(architecture: str, tmp_path: Path) -> None:
    """Whole parameters, transposed ones (gpt2), experts fused into one (mixtral), tied ones (gemma2)."""
    parents = family(tmp_path, architecture)
    model: Any = load_base(parents["base"], "float32")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge = Merge(one, parents)
    merge_into(one, parents, weights)
    with CoefficientSlopes(merge, weights) as slopes:
        loss(model).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    merged = {step.name for step in merge.steps if step.mix is not None}
    assert {name for name, param, source in slopes.partials if (param, source) == ("weight", "a")} == merged
    largest = sorted(merged, key=lambda name: -abs(slopes.partials[name, "weight", "a"]))[:6]
    for name, wanted in differences(parents, largest, model, weights).items():
        assert slopes.partials[name, "weight", "a"] == pytest.approx(wanted, rel=5e-3, abs=2e-5), name


def test_backward_passes_add_up(tmp_path: Path) -> None:
    parents = family(tmp_path, "llama")
    model: Any = load_base(parents["base"], "float32")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge_into(one, parents, weights)
    found = []
    for passes in (1, 2):
        with CoefficientSlopes(Merge(one, parents), weights) as slopes:
            for _ in range(passes):
                (loss(model) / passes).backward()
        found.append(slopes.partials)
    assert found[0].keys() == found[1].keys()
    for key, slope in found[0].items():
        assert found[1][key] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_method_without_derivatives_is_refused_by_name(tmp_path: Path) -> None:
    parents = family(tmp_path, "llama")
    weights = WeightMap(load_base(parents["base"], "float32"), parents["base"].tensors)
    mixes = [
        Mix("slerp", (("a", layer),), ("base", layer), params({"t": 0.5}))
        for layer in (*range(parents["base"].layout.num_layers), None, None)
    ]
    one = Recipe("base", tuple(mixes[:-2]), *mixes[-2:], out_dtype="float32")
    with pytest.raises(CandidateError, match="'slerp' is no sum of task vectors"):
        CoefficientSlopes(Merge(one, parents), weights)
