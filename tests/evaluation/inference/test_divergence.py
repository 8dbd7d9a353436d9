"""Divergences from a teacher against a plain loop, and their gradients against central differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.evaluation.inference import divergence
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support.text_architectures import VOCABULARY, build

TEXTS = [[(7 * i + n) % (VOCABULARY - 1) for i in range(length)] for n, length in enumerate((5, 2, 9, 5))]
WEIGHTS = (0.5, 2.0, 0.25, 1.0)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """(teacher, model), which differ, of an architecture that computes all of itself in float64."""
    found: list[Any] = []
    for seed in (0, 1):
        model: Any = build("gpt2").double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        found.append(model.requires_grad_(False))
    return found[0], found[1]


@pytest.fixture
def forwards(models: tuple[Any, Any]) -> Iterator[tuple[Forward, Forward]]:
    with RowHead(models[0]) as one, RowHead(models[1]) as two:
        yield Forward(models[0], one, 0), Forward(models[1], two, 0)


def by_loop(teacher: Any, model: Any) -> list[float]:
    """Each text's divergence, one text and position at a time in float64."""
    found = []
    for ids in TEXTS:
        inputs = torch.tensor([ids])
        with torch.no_grad():
            p = teacher(input_ids=inputs, use_cache=False).logits[0].double().log_softmax(-1)
            q = model(input_ids=inputs, use_cache=False).logits[0].double().log_softmax(-1)
        each = [float((p[at].exp() * (p[at] - q[at])).sum()) for at in range(len(ids))]
        found.append(sum(each) / len(each))
    return found


def test_divergences_are_those_of_a_loop(models: tuple[Any, Any], forwards: tuple[Forward, Forward]) -> None:
    taught = divergence.distributions(forwards[0], TEXTS)
    found = divergence.backward(forwards[1], taught, WEIGHTS)
    assert found == pytest.approx(by_loop(*models), rel=1e-9)
    assert min(found) > 1e-4
    itself = divergence.backward(forwards[0], taught, WEIGHTS)
    assert itself == pytest.approx([0.0] * len(TEXTS), abs=1e-6)


def test_gradients_are_central_differences(
    models: tuple[Any, Any], forwards: tuple[Forward, Forward]
) -> None:
    teacher, model = models
    taught = divergence.distributions(forwards[0], TEXTS)
    parameter = model.transformer.h[0].mlp.c_fc.weight
    parameter.requires_grad_(True)
    try:
        divergence.backward(forwards[1], taught, WEIGHTS)
        gradient = parameter.grad.clone()
    finally:
        parameter.requires_grad_(False)
        parameter.grad = None
    places = gradient.abs().flatten().argsort(descending=True)[[0, 1, 5]].tolist()
    for place in places:
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.view(-1)[place] += step
            found = by_loop(teacher, model)
            ends.append(sum(w * own for w, own in zip(WEIGHTS, found, strict=True)))
            with torch.no_grad():
                parameter.view(-1)[place] -= step
        wanted = (ends[0] - ends[1]) / 2e-4
        assert float(gradient.view(-1)[place]) == pytest.approx(wanted, rel=1e-4)


def test_batches_do_not_change_a_text(
    forwards: tuple[Forward, Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = divergence.distributions(forwards[0], TEXTS)
    monkeypatch.setattr(divergence, "_TOKENS", 1)
    alone = divergence.distributions(forwards[0], TEXTS)
    for one, two in zip(whole.logprobs, alone.logprobs, strict=True):
        assert torch.allclose(one, two, atol=1e-12)


def test_too_many_numbers_are_refused(
    forwards: tuple[Forward, Forward], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "MAX_NUMBERS", 100)
    with pytest.raises(CandidateError, match=r"21 tokens a step, .* give fewer retain_items"):
        divergence.distributions(forwards[0], TEXTS)
