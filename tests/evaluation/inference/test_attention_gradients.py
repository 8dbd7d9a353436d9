"""The backward pass of attention in half precision against the same attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from evomerge.evaluation.inference.attention_gradients import half_precision_attention

BATCH, HEADS, QUERIES, KEYS, SIZE = 3, 4, 5, 9, 8


def attend(*args: Any, **options: Any) -> torch.Tensor:
    """What a model calls, looked up at each call."""
    return functional.scaled_dot_product_attention(*args, **options)


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
def test_gradients_are_those_of_float64_but_for_rounding(kind: str, groups: int) -> None:
    given: Any = inputs(groups, QUERIES if kind == "causal" else KEYS)
    options: dict[str, Any] = {
        "attn_mask": {"bool": mask(torch.bool), "additive": mask(torch.bfloat16)}.get(kind),
        "is_causal": kind == "causal",
        "scale": 0.3,
        "enable_gqa": groups != HEADS,
    }
    gradient = torch.randn(BATCH, HEADS, QUERIES, SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = attend(*given, **options)
    with half_precision_attention():
        out = attend(*given, **options)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out, given, gradient)
    exact: Any = [tensor.detach().double().requires_grad_(True) for tensor in given]
    if kind == "additive":
        options["attn_mask"] = mask(torch.bfloat16).double()
    wanted = torch.autograd.grad(attend(*exact, **options), exact, gradient.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).abs().max()) <= 2**-7 * float(other.abs().max()) + 1e-6


def test_attention_without_gradients_or_in_float32_is_left_alone() -> None:
    given: Any = inputs(HEADS)
    wide: Any = [tensor.float() for tensor in given]
    with half_precision_attention():
        with torch.no_grad():
            assert attend(*given).grad_fn is None
        kinds = [type(attend(*each).grad_fn).__name__ for each in (wide, given)]
    assert [kind == "_AttentionBackward" for kind in kinds] == [False, True]
