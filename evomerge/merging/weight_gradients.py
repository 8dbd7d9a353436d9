"""Gradients of linear layers' and embeddings' weights, handed over as their factors before they are made.

The gradient of a linear layer's weight is sum_t g_t x_t^T of its inputs and the gradients of its outputs;
that of an embedding has the rows of the tokens that were looked up. Whoever needs no more than dot products
with it takes the factors, so that autograd never holds the gradient of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode


class GradientTaker(Protocol):
    """What takes the gradient of one weight."""

    def take_linear(self, inputs: Tensor, gradients: Tensor) -> None:
        """Takes sum_t g_t x_t^T.

        Args:
            inputs: [T, in].
            gradients: [T, out] of the loss by the outputs.
        """

    def take_lookups(self, ids: Tensor, gradients: Tensor) -> None:
        """Takes the gradient of an embedding.

        Args:
            ids: [T] rows that were looked up, some more than once.
            gradients: [T, width] of the loss by what was found.
        """


class WeightGradients(TorchFunctionMode):
    """While it is entered, gradients of some weights go to takers, and to no `grad`.

    with WeightGradients({id(layer.weight): taker}):
        loss(model).backward()

    The weights have to require gradients. A layer that runs again in the backward pass, where torch leaves
    all modes, has to enter `again`.
    """

    _entered: ClassVar[list[WeightGradients]] = []

    def __init__(self, takers: Mapping[int, GradientTaker]) -> None:
        """Makes a mode that is not entered.

        Args:
            takers: id of a parameter -> what takes its gradient.
        """
        super().__init__()
        self._takers = takers

    def __enter__(self) -> Self:
        self._entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._entered.remove(self)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @classmethod
    def again(cls) -> WeightGradients:
        """A mode with the takers of the one that was entered last, if there is one."""
        return WeightGradients(cls._entered[-1]._takers if cls._entered else {})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function; see `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if (func is linear or func is embedding) and len(args) > 1 and torch.is_grad_enabled():
            taker = self._takers.get(id(args[1]))
            if taker is not None and func is linear:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return _Linear.apply(args[0], args[1], bias, taker)  # type: ignore[no-untyped-call]
            if taker is not None and _is_plain(*args[2:], **kwargs):
                padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
                return _Embedding.apply(args[0], args[1], padding, taker)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _is_plain(
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> bool:
    """Whether an embedding is a mere lookup."""
    return max_norm is None and not scale_grad_by_freq and not sparse


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear` whose weight's gradient goes to a taker."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, taker: GradientTaker
    ) -> Tensor:
        """[..., out] of inputs [..., in]."""
        ctx.save_for_backward(inputs, weight)
        ctx.taker = taker
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by the inputs and the bias."""
        inputs, weight = ctx.saved_tensors
        needs_inputs, _, needs_bias, _ = ctx.needs_input_grad
        flat = gradients[0].reshape(-1, weight.shape[0])
        with torch.no_grad():
            ctx.taker.take_linear(inputs.reshape(-1, weight.shape[1]), flat)
            by_inputs = (flat @ weight).reshape(inputs.shape) if needs_inputs else None
            return by_inputs, None, flat.sum(0) if needs_bias else None, None


class _Embedding(torch.autograd.Function):
    """`torch.nn.functional.embedding` whose weight's gradient goes to a taker."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, taker: GradientTaker) -> Tensor:
        """[..., width] of ids [...]."""
        ctx.save_for_backward(ids)
        ctx.taker = taker
        ctx.padding = None if padding is None else padding % weight.shape[0]
        return embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        """Nothing: ids have no gradient, and the weight's is taken."""
        (ids,) = ctx.saved_tensors
        flat, gradient = ids.reshape(-1), gradients[0].reshape(-1, gradients[0].shape[-1])
        if ctx.padding is not None:
            used = flat != ctx.padding
            flat, gradient = flat[used], gradient[used]
        with torch.no_grad():
            ctx.taker.take_lookups(flat, gradient)
        return None, None, None, None
