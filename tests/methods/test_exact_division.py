"""Merges divide: torch's way of dividing by a Python number on CUDA, emulated, changes none of their bits."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from evomerge.methods import METHODS, row_sums
from evomerge.methods.exact_division import divided
from evomerge.methods.fused import MaskKind, Summand, WeightedSum, torch_kernels
from tests.support.launch_cases import bits, models, values_of

DIVISIONS = (torch.Tensor.div, torch.Tensor.div_, torch.div, torch.true_divide)
SHAPE = {"a": (12, 40)}
pytestmark = pytest.mark.usefixtures("_one_thread")


class ReciprocalDivision(TorchFunctionMode):
    """Divides by Python numbers as torch does on CUDA: multiplies with the reciprocal."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in DIVISIONS and isinstance(args[1], (int, float)):
            x, number = args
            one = torch.ones((), dtype=x.dtype)
            with torch._C.DisableTorchFunction():
                inverse = one / torch.full((), number, dtype=x.dtype)
                return x.mul_(inverse) if func is torch.Tensor.div_ else x * inverse
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _one_thread():
    """The emulation is of one thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_emulated_division_differs_and_an_exact_one_does_not():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    exact = torch.from_numpy((x.numpy().astype(np.float64) / np.float64(np.float32(1.2))).astype(np.float32))
    with ReciprocalDivision():
        emulated, ours = x / 1.2, divided(x, 1.2)
    assert torch.equal(bits(ours), bits(exact))
    assert torch.equal(bits(x / 1.2), bits(exact))  # on a CPU
    assert (emulated != exact).sum() > 1000


def test_a_normalized_sum_divides_exactly():
    case = models(3, torch.float32, seed=1, shapes=SHAPE)
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in (0.5, 0.4, 0.3)), divisor=1.2)
    base, sources = case.bases[0].view(-1), [x.view(-1) for x in case.sources[0]]
    here, there = torch.empty_like(base), torch.empty_like(base)
    torch_kernels.write_sum(base, sources, total, here)
    with ReciprocalDivision():
        torch_kernels.write_sum(base, sources, total, there)
    assert torch.equal(bits(here), bits(there))


@pytest.mark.parametrize("rule", METHODS.values(), ids=lambda rule: rule.name)
def test_no_method_divides_by_a_python_number(rule):
    count = min(3, rule.models[1])
    case = models(count, torch.float64, seed=2, shapes=SHAPE)
    for switched in (0.0, 1.0):
        flags = {p.name: switched for p in rule.params if p.flag}
        values = values_of(rule, count, 3, **flags)
        base = case.bases[0] if rule.needs_base or rule.base_is_origin else None
        here = rule.kernel(case.sources[0], base, values, [1] * count)
        with ReciprocalDivision():
            there = rule.kernel(case.sources[0], base, values, [1] * count)
        assert torch.equal(bits(here), bits(there))


def test_rows_of_their_own_weights_are_divided_exactly():
    case = models(2, torch.float32, seed=4, shapes=SHAPE)
    rule, weights = METHODS["linear"], [[0.1 * i for i in range(1, 13)], [0.07] * 12]
    here, there = torch.empty(12, 40), torch.empty(12, 40)
    row_sums.merge_rows(case.sources[0], None, values_of(rule, 2, 5, normalize=1.0), weights, here)
    with ReciprocalDivision():
        row_sums.merge_rows(case.sources[0], None, values_of(rule, 2, 5, normalize=1.0), weights, there)
    assert torch.equal(bits(here), bits(there))
