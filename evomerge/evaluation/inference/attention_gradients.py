"""Gradients of attention in half precision on a CPU.

The forward pass is torch's own, bit for bit. torch's backward kernel for CPUs is slow in bfloat16 and float16
where few queries attend, as scored continuations do: fifteen times as long as the forward pass, where in
float32 it is twice. There the backward pass runs in float32, on a forward pass of its own, and its gradients
are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)
_MOST_QUERIES = 256  # of a row; from there on torch's own backward pass is as fast


class HalfPrecisionAttention(TorchFunctionMode):
    """While it is entered, attention in half precision on a CPU has a backward pass in float32.

    with HalfPrecisionAttention():
        loss = model(input_ids=ids).logits.sum()
    loss.backward()
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function; see `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and len(args) == 3 and _is_slow(*args, kwargs):
            return _Attention.apply(*args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _is_slow(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether attention is differentiated where torch's backward pass is slow, by query, key and value."""
    mask = options.get("attn_mask")
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype in _HALF
        and query.shape[-2] <= _MOST_QUERIES
        and any(tensor.requires_grad for tensor in (query, key, value))
        and not options.get("dropout_p")
        and (mask is None or not mask.requires_grad)
    )


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention whose backward pass is in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
        """See `scaled_dot_product_attention`."""
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return scaled_dot_product_attention(query, key, value, **options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by query, key and value; those of another type than float32 are rounded by torch."""
        saved = ctx.saved_tensors  # asked for once: layers that run again unpack them once
        options = dict(ctx.options)
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = mask.float()
        with torch.enable_grad():
            wide = [tensor.detach().float().requires_grad_(True) for tensor in saved]
            out = scaled_dot_product_attention(*wide, **options)
        found = torch.autograd.grad(out, wide, gradients[0].float())
        return *(g.to(t.dtype) for g, t in zip(found, saved, strict=True)), None
