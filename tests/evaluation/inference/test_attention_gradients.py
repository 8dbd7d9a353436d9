"""The backward pass of attention in half precision against the same attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from evomerge.evaluation.inference.attention_gradients import HalfPrecisionAttention

BATCH, HEADS, QUERIES, KEYS, SIZE = 3, 4, 5, 9, 8


def inputs(groups: int, keys: int = KEYS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, QUERIES), (groups, keys), (groups, keys)]
    return [
        torch.randn(BATCH, heads, length, SIZE, generator=generator).bfloat16().requires_grad_(True)
        for heads, length in shapes
    ]


def mask(dtype: torch.dtype) -> torch.Tensor:
    """Causal, and the first row of the batch sees fewer keys."""
    seen = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    seen[0, :, :, 2:4] = False
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_gradients_are_those_of_float64_rounded_once(kind: str, groups: int) -> None:
    given: Any = inputs(groups, QUERIES if kind == "causal" else KEYS)
    options: dict[str, Any] = {
        "attn_mask": {"bool": mask(torch.bool), "additive": mask(torch.bfloat16)}.get(kind),
        "is_causal": kind == "causal",
        "scale": 0.3,
        "enable_gqa": groups != HEADS,
    }
    gradient = torch.randn(BATCH, HEADS, QUERIES, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = scaled_dot_product_attention(*given, **options)
    with HalfPrecisionAttention():
        out = scaled_dot_product_attention(*given, **options)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out, given, gradient)
    exact: Any = [tensor.detach().double().requires_grad_(True) for tensor in given]
    if kind == "additive":
        options["attn_mask"] = mask(torch.bfloat16).double()
    wanted = torch.autograd.grad(scaled_dot_product_attention(*exact, **options), exact, gradient.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).abs().max()) <= 2**-8 * float(other.abs().max()) + 1e-6


def test_attention_without_gradients_or_in_float32_is_left_alone() -> None:
    given: Any = inputs(HEADS)
    wide: Any = [tensor.float() for tensor in given]
    with HalfPrecisionAttention():
        with torch.no_grad():
            assert scaled_dot_product_attention(*given).grad_fn is None
        kinds = [type(scaled_dot_product_attention(*each).grad_fn).__name__ for each in (wide, given)]
    assert [kind == "_AttentionBackward" for kind in kinds] == [False, True]
