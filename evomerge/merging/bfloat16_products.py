"""Linear layers in bfloat16 on processors that have no instructions for it.

Without them (x86 before AVX-512 BF16: AVX2 alone, most desktops) torch multiplies bfloat16 matrices
element by element, 10 to 50 times slower than float32 ones. There `install` has linear layers of enough rows
multiply in float32 and round the result to bfloat16 once, which is what the instructions and torch's own loop
do too: the sums differ in their order alone. Where the processor has the instructions nothing changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEW_ROWS = 16
"""Rows below which torch's own loop is faster than a copy of the weights in float32."""
_by_torch = functional.linear


@functools.cache
def is_native() -> bool:
    """Whether the processor multiplies bfloat16 matrices; True where torch does not say."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # torch without oneDNN, or another version's name
        return True


def install() -> None:
    """Has this process's linear layers use float32 products where bfloat16 ones are slow.

    It replaces `torch.nn.functional.linear`, so that every model of the process, lm-eval's own too, computes
    the same numbers. Nothing happens at a second call, or where the processor has the instructions.
    """
    if not is_native():
        functional.linear = linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, with bfloat16 products of many rows on a CPU made in float32.

    Args:
        input: [..., columns].
        weight: [outputs, columns].
        bias: [outputs] or None.

    Returns:
        [..., outputs] in the input's type.
    """
    is_bfloat16 = input.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16
    if not (is_bfloat16 and input.device.type == "cpu" and input.numel() >= FEW_ROWS * weight.shape[-1]):
        return _by_torch(input, weight, bias)
    needs_graph = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, weight, bias)
    )
    if needs_graph:
        product: Tensor = _Product.apply(input, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return _rounded(input, weight, bias)


class _Product(torch.autograd.Function):
    """The same with a gradient; the graph keeps no copies in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _rounded(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wide = gradient.float()
        rows = wide.reshape(-1, wide.shape[-1])
        by_input, by_weight, by_bias = ctx.needs_input_grad
        return (
            (wide @ weight.float()).to(torch.bfloat16) if by_input else None,
            (rows.T @ input.reshape(len(rows), -1).float()).to(torch.bfloat16) if by_weight else None,
            rows.sum(0).to(torch.bfloat16) if by_bias else None,
        )


def _rounded(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide_bias = None if bias is None else bias.float()
    return _by_torch(input.float(), weight.float(), wide_bias).to(torch.bfloat16)
