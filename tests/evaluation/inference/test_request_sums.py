"""Sums of log-probabilities: exact, the same in every order, and those of a loop in float64."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from evomerge.evaluation.inference.request_sums import RequestSums

CPU = torch.device("cpu")
SIZE = 7


def terms(seed: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(request, log-probability) of 400 tokens, from logits of a type and a size."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(400, 50, generator=generator) * scale).to(dtype)
    target = torch.randint(50, (400,), generator=generator)
    logprobs = torch.log_softmax(logits.float(), -1)[torch.arange(400), target]
    return torch.randint(SIZE, (400,), generator=generator), logprobs


def summed(request: Tensor, logprobs: Tensor, pieces: int = 1) -> Tensor:
    """The sums, terms given in so many steps."""
    sums = RequestSums(SIZE, CPU)
    for part, own in zip(request.chunk(pieces), logprobs.chunk(pieces), strict=True):
        sums.add(part, own)
    return sums.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0, 80.0])
def test_sums_are_exact_and_those_of_one_addition_after_the_other(scale: float, dtype: torch.dtype) -> None:
    request, logprobs = terms(0, scale, dtype)
    exact = [Fraction(0)] * SIZE
    in_order = [0.0] * SIZE
    for r, x in zip(request.tolist(), logprobs.tolist(), strict=True):
        exact[r] += Fraction(x)
        in_order[r] += x
    found = summed(request, logprobs).tolist()
    assert found == [float(value) for value in exact]
    assert found == in_order


@pytest.mark.parametrize("seed", range(5))
def test_no_order_and_no_step_changes_a_bit(seed: int) -> None:
    request, logprobs = terms(seed, 5.0, torch.float32)
    expected = summed(request, logprobs)
    order = torch.tensor(random.Random(seed).sample(range(400), 400))
    assert torch.equal(summed(request[order], logprobs[order]), expected)
    assert torch.equal(summed(request, logprobs, pieces=7), expected)


def test_tokens_that_are_certain_and_tokens_that_are_impossible_have_one_sum_in_every_order() -> None:
    rnd = random.Random(1)
    numbers = [-rnd.uniform(600, 1000) for _ in range(40)] + [-rnd.uniform(1, 3) * 2**-23 for _ in range(40)]
    logprobs = torch.tensor(numbers)
    request = torch.zeros(80, dtype=torch.long)
    exact = float(sum(map(Fraction, logprobs.tolist())))
    in_float64 = set()
    for _ in range(20):
        order = torch.tensor(rnd.sample(range(80), 80))
        in_float64.add(sum(logprobs[order].tolist()))
        assert summed(request, logprobs[order])[0].item() == exact
    assert len(in_float64) > 1, "these terms do not show the difference"


def test_large_terms_keep_their_size() -> None:
    request = torch.tensor([0, 0, 1])
    found = summed(request, torch.tensor([-3.0e38, -1.5, -(2.0**21)]))
    assert found[:2].tolist() == [float(torch.tensor(-3.0e38)), -(2.0**21)]


def test_what_is_no_number_stays_none() -> None:
    request = torch.tensor([0, 0, 1, 1, 2])
    found = summed(request, torch.tensor([-1.0, math.nan, -1.0, -math.inf, -2.0]))
    assert math.isnan(found[0])
    assert found[1:3].tolist() == [-math.inf, -2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_gives_the_sums_of_the_cpu() -> None:
    request, logprobs = terms(3, 5.0, torch.bfloat16)
    expected = summed(request, logprobs)
    sums = RequestSums(SIZE, torch.device("cuda"))
    sums.add(request.cuda(), logprobs.cuda())
    assert torch.equal(sums.total().cpu(), expected)
