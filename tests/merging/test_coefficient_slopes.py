"""Derivatives of a live model's loss by the coefficients of its merge, against central differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import CandidateError
from evomerge.evaluation.inference.attention_gradients import half_precision_attention
from evomerge.evaluation.inference.layer_recomputation import recomputed_layers
from evomerge.merging import coefficient_slopes
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.model_loading import load_base
from evomerge.merging.weight_map import WeightMap
from evomerge.methods.fused.one_pass import projections
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


@pytest.mark.parametrize("adds_up", [True, False], ids=["added up", "one at a time"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2"])
def test_partials_are_the_models_own_differences(architecture: str, adds_up: bool, tmp_path: Path) -> None:
    """Whole parameters, transposed ones (gpt2), experts fused into one (mixtral), tied ones (gemma2)."""
    parents = family(tmp_path, architecture)
    model: Any = load_base(parents["base"], "float32")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge = Merge(one, parents)
    merge_into(one, parents, weights)
    with CoefficientSlopes(merge, weights, adds_up=adds_up) as slopes:
        loss(model).backward()
        assert adds_up or all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    merged = {step.name for step in merge.steps if step.mix is not None}
    assert {name for name, param, source in slopes.partials if (param, source) == ("weight", "a")} == merged
    largest = sorted(merged, key=lambda name: -abs(slopes.partials[name, "weight", "a"]))[:6]
    for name, wanted in differences(parents, largest, model, weights).items():
        assert slopes.partials[name, "weight", "a"] == pytest.approx(wanted, rel=5e-3, abs=2e-5), name


def naive(merge: Merge, weights: WeightMap, passes: int = 1) -> dict[tuple[str, str, str], float]:
    """Partials of whole gradients that are all kept, and multiplied with task vectors afterwards."""
    model: Any = weights.model
    model.requires_grad_(True)
    for _ in range(passes):
        loss(model).backward()
    found = {}
    for parameter in model.parameters():
        for name in weights.fed_by(parameter):
            gradient = weights.gradient(name, parameter.grad)
            base, *sources = (merge.parents[model].tensor(name) for model in ("base", "a", "b"))
            products = projections(gradient, base, sources)
            for source, other, product in zip(("a", "b"), sources, products, strict=True):
                exact = float((gradient.double() * (other.float() - base.float()).double()).sum())
                assert product == pytest.approx(exact, rel=1e-9, abs=1e-12)
                found[name, "weight", source] = product
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_partials_are_those_of_gradients_that_are_all_kept(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added up: bit for bit, two passes too. One at a time: the same products, in another order of sums."""
    monkeypatch.setattr(coefficient_slopes, "_BLOCK", 200)  # elements: a few rows
    parents = family(tmp_path, architecture)
    model: Any = load_base(parents["base"], str(dtype).removeprefix("torch."))
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge = Merge(one, parents)
    merge_into(one, parents, weights)
    for passes in (1, 2):
        wanted = naive(merge, weights, passes)
        with CoefficientSlopes(merge, weights, adds_up=True) as kept:
            for _ in range(passes):
                loss(model).backward()
        with CoefficientSlopes(merge, weights, adds_up=False) as freed:
            for _ in range(passes):
                loss(model).backward()
        assert {key: kept.partials[key] for key in wanted} == wanted
        size = max(map(abs, wanted.values()))
        for key, value in wanted.items():
            assert freed.partials[key] == pytest.approx(
                value, rel=1e-5, abs=size * (1e-6 if dtype == torch.float32 else 4e-3)
            ), key


def test_no_gradient_of_a_linear_layer_or_an_embedding_is_ever_held(tmp_path: Path) -> None:
    """Their parameters' hooks do not fire; those of norms do."""
    parents = family(tmp_path, "llama")
    model: Any = load_base(parents["base"], "float32")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge_into(one, parents, weights)
    held: list[str] = []

    def watch(name: str, parameter: torch.Tensor) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            held.extend([name] * (parameter.grad is not None))

        return parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)

    handles = [watch(name, parameter) for name, parameter in model.named_parameters()]
    with CoefficientSlopes(Merge(one, parents), weights, adds_up=False):
        loss(model).backward()
    for handle in handles:
        handle.remove()
    assert held
    assert all("norm" in name for name in held)


def test_layers_that_run_again_hand_over_the_same_gradients(tmp_path: Path) -> None:
    """Modes of torch are left in a backward pass, and have to be entered again there."""
    parents = family(tmp_path, "llama")
    model: Any = load_base(parents["base"], "bfloat16")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    merge_into(one, parents, weights)
    found = []
    for context in (nullcontext, lambda: recomputed_layers(model)):
        slopes = CoefficientSlopes(Merge(one, parents), weights, adds_up=False)
        with slopes, context(), half_precision_attention():
            loss(model).backward()
        found.append(slopes.partials)
    assert found[0] == found[1]
    assert all(vars(layer).get("forward") is None for layer in model.model.layers)


def test_an_error_in_a_backward_pass_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    parents = family(tmp_path, "llama")
    model: Any = load_base(parents["base"], "float32")
    weights = WeightMap(model, parents["base"].tensors)
    one = recipe(parents["base"].layout.num_layers)
    slopes = CoefficientSlopes(Merge(one, parents), weights)

    def break_off() -> None:
        with slopes:
            loss(model).backward()
            raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        break_off()
    assert not slopes.partials
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


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
