"""Gradients of attention in half precision on a CPU.

The forward pass is torch's own, bit for bit. torch's backward kernel for CPUs is slow in bfloat16 and float16
where few queries attend, as scored continuations do: fifteen times as long as the forward pass, where in
float32 it is about as long. There the backward kernel is given float32 copies, and its gradients are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_by_torch = functional.scaled_dot_product_attention
_HALF = (torch.bfloat16, torch.float16)
_MOST_QUERIES = 256  # of a row; from there on torch's own backward pass is as fast


@contextmanager
def half_precision_attention() -> Iterator[None]:
    """While it is entered, attention in half precision on a CPU has a backward pass in float32.

    with half_precision_attention():
        loss = model(input_ids=ids).logits.sum()
    loss.backward()

    It stands in for torch's function, which transformers looks up at each call: a mode of torch would be
    asked about every operation of the model, and be left in backward passes, where layers run again.

    Yields:
        Nothing.
    """
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = _by_torch


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `scaled_dot_product_attention`."""
    if _is_slow(query, key, value, *args, **kwargs):
        return _attend(query, key, value, *args, **kwargs)
    return _by_torch(query, key, value, *args, **kwargs)


def _is_slow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether torch would differentiate this by its kernel for CPUs, in half precision and of few queries."""
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype in _HALF
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[-2] <= _MOST_QUERIES
        and query.shape[-1] == value.shape[-1]
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        and (attn_mask is None or (attn_mask.dim() == 4 and not attn_mask.requires_grad))
        and not dropout_p
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """See `scaled_dot_product_attention`."""
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    inputs = (query, key, value, attn_mask, is_causal, scale, groups)
    found: Tensor = _Attention.apply(*inputs)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    """torch's kernel for CPUs, whose backward pass is in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        groups: int,
    ) -> Tensor:
        """[B, H, Q, D] of query [B, H, Q, D] and key, value [B, H / groups, K, D]."""
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = kernel(
            query, *_spread(key, value, groups), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.mask, ctx.is_causal, ctx.scale, ctx.groups = mask, is_causal, scale, groups
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by query, key and value."""
        *halves, logsumexp = ctx.saved_tensors  # asked for once: layers that run again unpack them once
        query, key, value, out = (tensor.float() for tensor in halves)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_query, by_key, by_value = kernel(
            gradients[0].float(), query, *_spread(key, value, ctx.groups), out, logsumexp, 0.0, ctx.is_causal,
            attn_mask=None if ctx.mask is None else ctx.mask.float(), scale=ctx.scale,
        )  # fmt: skip
        if ctx.groups > 1:
            by_key, by_value = (own.unflatten(1, (-1, ctx.groups)).sum(2) for own in (by_key, by_value))
        half = halves[0].dtype
        return by_query.to(half), by_key.to(half), by_value.to(half), None, None, None, None


def _spread(key: Tensor, value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Keys and values of every head of queries."""
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
