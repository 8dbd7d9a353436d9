import pytest
import torch
from torch.nn import functional

from evomerge.merging import bfloat16_products
from evomerge.merging.bfloat16_products import FEW_ROWS, linear


@pytest.fixture
def torch_linear(monkeypatch):
    """torch's own function in place, whatever models this process loaded before."""
    monkeypatch.setattr(functional, "linear", bfloat16_products._by_torch)
    return bfloat16_products._by_torch


def _tensors(rows, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, rows, 24), (40, 24), (40,))
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def test_bfloat16_products_are_exact_sums_rounded_once():
    x, weight, bias = _tensors(FEW_ROWS)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    distance = (linear(x, weight, bias).double() - exact).abs()
    assert linear(x, weight, bias).dtype is torch.bfloat16
    assert bool((distance <= exact.abs() * 2**-8 + 1e-6).all())  # half a unit of the last of 8 bits


def test_gradients_are_those_of_torchs_own_function_to_rounding(torch_linear):
    def gradients(function):
        inputs = _tensors(FEW_ROWS)
        function(*inputs).float().square().sum().backward()
        return [tensor.grad for tensor in inputs]

    for mine, reference in zip(gradients(linear), gradients(torch_linear), strict=True):
        assert mine.dtype is torch.bfloat16
        assert float((mine.float() - reference.float()).norm() / reference.float().norm()) < 0.01


@pytest.mark.parametrize(
    ("rows", "dtype"), [(FEW_ROWS // 2 - 1, torch.bfloat16), (FEW_ROWS, torch.float32), (64, torch.float16)]
)
def test_few_rows_and_other_types_are_left_to_torch(rows, dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(bfloat16_products, "_by_torch", lambda *given: seen.extend(given))
    given = _tensors(rows, dtype)
    linear(*given)
    assert [id(tensor) for tensor in seen] == [id(tensor) for tensor in given]


def test_a_processor_with_the_instructions_keeps_torchs_function(torch_linear, monkeypatch):
    monkeypatch.setattr(bfloat16_products, "is_native", lambda: True)
    bfloat16_products.install()
    assert functional.linear is torch_linear
    monkeypatch.setattr(bfloat16_products, "is_native", lambda: False)
    bfloat16_products.install()
    bfloat16_products.install()
    assert functional.linear is linear
