"""Log-probabilities of scored tokens from logits, a few rows at a time, with a gradient that is as lean."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.evaluation.inference.loglikelihood_plan import Reads

Rounding = Literal["float32", "model"]
"""How log-probabilities are rounded; see `Engine.run`."""
_PIECE = 512  # rows whose float32 logits are held at once


def target_logprobs(logits: Tensor, reads: Reads, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Computes the log-probability of each scored token.

    Args:
        logits: [N, V] of the rows that are read.
        reads: What is read.
        rounding: See `Engine.run`.

    Returns:
        (log-probability of each target, likeliest token at its row), both [M].
    """
    if rounding == "model":
        rounded = torch.cat([torch.log_softmax(piece, -1) for piece in torch.split(logits, _PIECE)])
        likeliest = rounded.argmax(-1)  # rounding makes ties, and the first of them wins
        return rounded[reads.row, reads.target], likeliest[reads.row]
    logprobs = logits[reads.row, reads.target].float() - _normalizers(logits)[reads.row]
    return logprobs, logits.argmax(-1)[reads.row]


def differentiable_logprobs(logits: Tensor, reads: Reads) -> Tensor:
    """Computes the log-probability of each scored token, with a graph that keeps the logits alone.

    Args:
        logits: [N, V] of the rows that are read.
        reads: What is read.

    Returns:
        [M] of float32, the numbers of `target_logprobs`.
    """
    found: Tensor = _Logprobs.apply(logits, reads)  # type: ignore[no-untyped-call]
    return found


class _Logprobs(torch.autograd.Function):
    """Logits -> log-probabilities of targets. No float32 copy of all logits is kept or made."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reads: Reads) -> Tensor:
        """[M] of float32 from logits [N, V]."""
        normalizers = _normalizers(logits)
        ctx.save_for_backward(logits, normalizers)
        ctx.reads = reads
        return logits[reads.row, reads.target].float() - normalizers[reads.row]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """[N, V]: minus the softmax, times the sum of a row's gradients, plus each gradient at its target."""
        logits, normalizers = ctx.saved_tensors
        reads, gradient = ctx.reads, gradients[0]
        sums = torch.zeros_like(normalizers).index_add_(0, reads.row, gradient)
        found = torch.empty_like(logits)
        for first in range(0, len(logits), _PIECE):
            rows = slice(first, first + _PIECE)
            piece = torch.exp(logits[rows].float() - normalizers[rows, None]).mul_(-sums[rows, None])
            own = (reads.row >= first) & (reads.row < first + _PIECE)
            at = (reads.row[own] - first, reads.target[own])
            piece.index_put_(at, gradient[own], accumulate=True)
            found[rows] = piece
        return found, None


def _normalizers(logits: Tensor) -> Tensor:
    """[N] of float32: log of the sum of exponentials of each row."""
    return torch.cat([torch.logsumexp(piece.float(), -1) for piece in torch.split(logits, _PIECE)])
