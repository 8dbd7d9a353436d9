"""Sums of task vectors with a weight for each row of a tensor and source: merged, and derived by the weights.

The row of a tensor is an index of its first dimension. Every operation is one IEEE operation on float32 in
the order of `evomerge.methods.fused.torch_kernels`, so that rows of equal weight give the bits of one weight
for the tensor. Not for methods with a sparsifier or sign election, where a weight changes what others keep.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Values

_PIECE = 1 << 20  # elements held in float32 at a time
_NO_DIVISOR = 1e-8  # of a sum with a base: a smaller sum of weights counts as 1


def takes_rows(rule: Method) -> bool:
    """Whether a method can have a weight for each row.

    Args:
        rule: The method.

    Returns:
        True for a plain sum of task vectors or of models, such as task_arithmetic and linear.
    """
    own = rule.task_vector_sum
    return (
        own is not None and own.sparsifier is None and not own.elect_sign and rule.param("weight") is not None
    )


def merge_rows(
    sources: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    weights: Sequence[Sequence[float]],
    out: Tensor,
) -> bool:
    """Merges one tensor.

    Args:
        sources: One tensor per source, all of one shape of at least one dimension, in any float type.
        base: The base model's tensor; None for a method without a base.
        values: The method's parameter values for this tensor; its weights are not read.
        weights: [sources][rows].
        out: Receives the result.

    Returns:
        Whether every element of the result is finite.
    """
    factor = float(np.float32(_lambda(values)))
    table, divisors = _tables(values, weights, base is not None, out.device)
    finite = [torch.ones((), dtype=torch.bool, device=out.device)]
    for rows in _pieces(out):
        zero = torch.zeros(out[rows].shape, device=out.device)
        b = zero if base is None else base[rows].float()
        terms = [(x[rows].float() - b) * _column(w[rows], b) for x, w in zip(sources, table, strict=True)]
        mixed = functools.reduce(torch.add, terms, zero)
        if divisors is not None:
            mixed = mixed / _column(divisors[rows], b)
        result = (b + mixed * factor).to(out.dtype)
        out[rows] = result
        finite.append(torch.isfinite(result).all())
    return bool(torch.stack(finite).all())


def row_slopes(
    sources: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    weights: Sequence[Sequence[float]],
    gradient: Tensor,
) -> list[Tensor]:
    """Computes the derivatives of a loss by the weights of one tensor.

    Args:
        sources: As for `merge_rows`.
        base: As for `merge_rows`.
        values: As for `merge_rows`.
        weights: As for `merge_rows`.
        gradient: Of the loss by the merged tensor, of its shape.

    Returns:
        For each source [rows] of float64.
    """
    factor = _lambda(values)
    table, divisors = _tables(values, weights, base is not None, gradient.device)
    found: list[list[Tensor]] = [[] for _ in sources]
    for rows in _pieces(gradient):
        g = gradient[rows].float()
        parts = [x[rows].float() for x in sources]
        if base is not None:
            b = base[rows].float()
            parts = [part - b for part in parts]
        inner = [_row_dots(g, part) for part in parts]
        if divisors is not None:
            divisor = divisors[rows].double()
            mean = sum(w[rows].double() * dot for w, dot in zip(table, inner, strict=True)) / divisor
            moves = _moves(table, rows, base is not None)
            inner = [(dot - mean * moves) / divisor for dot in inner]
        for of_source, dots in zip(found, inner, strict=True):
            of_source.append(factor * dots)
    return [torch.cat(of_source).cpu() for of_source in found]


def _tables(
    values: Values, weights: Sequence[Sequence[float]], based: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """([sources, rows] of float32 weights, [rows] of divisors; None where nothing is divided)."""
    exact = torch.tensor([list(of_source) for of_source in weights], dtype=torch.float64)
    divisors = None
    if values["normalize"]:
        total = exact.sum(dim=0)
        divisors = torch.where(total.abs() < _NO_DIVISOR, 1.0, total) if based else total
        divisors = divisors.float().to(device)
    return exact.float().to(device), divisors


def _moves(table: Tensor, rows: slice, based: bool) -> Tensor:
    """[rows] 1.0, and 0.0 where the divisor counts as 1 and so does not move with the weights."""
    total = table[:, rows].double().sum(dim=0)
    return torch.where((total.abs() < _NO_DIVISOR) & based, 0.0, 1.0)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """[rows] dot products of the rows, summed in float64."""
    return (a * b).reshape(len(a), -1).sum(dim=1, dtype=torch.float64)


def _column(of_rows: Tensor, like: Tensor) -> Tensor:
    """[rows, 1, ...] of the dimensions of a tensor."""
    return of_rows.reshape(-1, *[1] * (like.dim() - 1))


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """Spans of rows that hold about a million elements."""
    rows = len(tensor)
    step = max(1, _PIECE // max(1, tensor.numel() // max(1, rows)))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _lambda(values: Values) -> float:
    factor = values.get("lambda", 1.0)
    assert isinstance(factor, float)
    return factor
