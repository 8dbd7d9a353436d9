"""The way to a plan's gradient follows from the plan and the sizes of the model's graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evomerge.evaluation.inference.gradient_memory import GraphSizes, Way, choose_way, measure
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import ForwardStep, LoglikelihoodPlan, Reads
from evomerge.evaluation.inference.target_logprobs import differentiable_logprobs, target_logprobs
from tests.support.text_architectures import build

SIZES = GraphSizes(token=100.0, pair=1.0, row=0.0, input=10.0, layers=4, bound=0)


def plan(*steps: ForwardStep) -> LoglikelihoodPlan:
    tokens = sum(step.ids.numel() for step in steps)
    return LoglikelihoodPlan("prefix", steps, 1, torch.zeros(1, dtype=torch.long), tokens)


def ids(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.long)


@pytest.mark.parametrize(
    ("bound", "way"),
    [
        (5000, Way(1)),  # 20 tokens that see 20, and 2 rows of 10 that see 30
        (4999, Way(1, recomputes=True)),
        (1050, Way(1, recomputes=True)),  # 400 for what enters, and a fourth of the larger step
        (1049, Way(2, recomputes=True)),
    ],
)
def test_the_fastest_way_that_fits_is_taken(bound: int, way: Way) -> None:
    shared = plan(ForwardStep(ids(1, 20), keep=0), ForwardStep(ids(2, 10), source=0, spread=2, drop=(0,)))
    assert choose_way(shared, replace(SIZES, bound=bound)) == way


def test_steps_that_fit_one_at_a_time_are_not_run_again() -> None:
    rows = plan(*[ForwardStep(ids(1, 10))] * 20)
    assert choose_way(rows, replace(SIZES, bound=1100)) == Way(2)
    assert choose_way(rows, replace(SIZES, bound=1099)) == Way(2, recomputes=True)
    assert choose_way(rows, replace(SIZES, bound=1099, layers=0)) == Way(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_sizes_are_what_a_longer_forward_saves(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype).requires_grad_(True)
    saved: dict[int, torch.Tensor] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with Engine(model) as engine:
        sizes = measure(engine.forward)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = engine.forward(torch.zeros(1, dtype=torch.long), ids(2, 48), None)
    assert logits.requires_grad
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert sizes.token * 96 + sizes.pair * 96 * 48 == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_with_a_lean_gradient_are_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 11, generator=generator).to(dtype).requires_grad_(True)  # more than a piece
    row = torch.tensor([0, 0, 3, 511, 512, 599, 599])
    reads = Reads(
        torch.arange(600), row, torch.tensor([1, 1, 2, 0, 10, 4, 5]), torch.zeros(7, dtype=torch.long)
    )
    weights = torch.linspace(-1, 1, 7)
    found = differentiable_logprobs(logits, reads)
    assert torch.equal(found, target_logprobs(logits, reads, "float32")[0])
    (lean,) = torch.autograd.grad(found, logits, weights)
    exact = logits.detach().double().requires_grad_(True)
    wanted = (exact.log_softmax(-1)[row, reads.target] * weights.double()).sum()
    (gradient,) = torch.autograd.grad(wanted, exact)
    assert float((lean.double() - gradient).abs().max()) <= (1e-6 if dtype == torch.float32 else 2**-9)
