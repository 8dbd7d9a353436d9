"""Dot products and sums of tensors, for the methods that take a tensor, or each of its rows, as a vector.

Dot products are summed in 64-bit floats, so that a merge does not depend on the number of threads; the
elements themselves are mixed in the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements that are held in 64-bit floats at a time."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two matrices.

    Args:
        a: [rows, length].
        b: [rows, length].

    Returns:
        [rows] float64.
    """
    width = max(1, CHUNK // max(1, a.shape[0]))
    out = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for p, q in zip(torch.split(a, width, 1), torch.split(b, width, 1), strict=True):
        out += (p.double() * q.double()).sum(dim=1)
    return out


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Dot products of all pairs, each tensor one vector.

    Args:
        tensors: Tensors of one shape.

    Returns:
        A symmetric matrix, [tensors][tensors].
    """
    flat = [x.reshape(1, -1) for x in tensors]
    out = [[0.0] * len(flat) for _ in flat]
    for i, x in enumerate(flat):
        for j, y in enumerate(flat[: i + 1]):
            out[i][j] = out[j][i] = dot(x, y).item()
    return out


def form(matrix: Sequence[Sequence[float]], a: Sequence[float], b: Sequence[float]) -> float:
    """A bilinear form: with a Gram matrix, the dot product of two combinations of its tensors.

    Args:
        matrix: [n][n].
        a: [n] coefficients.
        b: [n] coefficients.

    Returns:
        sum_ij a_i matrix_ij b_j.
    """
    return sum(p * q * m for p, row in zip(a, matrix, strict=True) for q, m in zip(b, row, strict=True))


def combine(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """A linear combination of tensors.

    Args:
        coefficients: One per tensor.
        tensors: Tensors of one shape and dtype, at least one.

    Returns:
        sum_i c_i x_i, in the dtype of the tensors.
    """
    out = tensors[0] * coefficients[0]
    for c, x in zip(coefficients[1:], tensors[1:], strict=True):
        out.add_(x, alpha=c)
    return out


def differences(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    """Differences from a base, where there is one.

    Args:
        tensors: Tensors of one shape.
        base: Of the same shape, or None.

    Returns:
        x_i - b, or the tensors themselves if there is no base.
    """
    return list(tensors) if base is None else [x - base for x in tensors]
