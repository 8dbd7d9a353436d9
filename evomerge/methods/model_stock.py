"""Model Stock (Jang et al. 2024, arXiv 2403.19522): between base and average, by the angle of fine-tunes.

cos θ is the mean over pairs of cos(x_i - b, x_j - b), of whole tensors or, if `filter_wise`, of vectors along
the last axis; t = n cos θ / (1 + (n-1) cos θ).

mergekit takes a product of lengths below 1e-6 for 1e-6, so that small fine-tunes look unrelated; here a
cosine is exact, and 0 where a fine-tune is the base. Above a right angle mergekit's t is negative and grows
without bound, a step away from the models; here it is 0, the base, as the paper's geometry has no such angle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Values, switch
from evomerge.methods.dot_products import dot
from evomerge.methods.exact_division import divided


def model_stock(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: t · average + (1-t) · base."""
    assert base is not None
    if not base.numel():
        return base.clone()
    b, *xs = [_rows(x, by_filter=bool(values["filter_wise"])) for x in (base, *tensors)]
    mixed = _mix_as_mergekit(b, xs) if mergekit_compatible else _mix(b, xs)
    return mixed.reshape(base.shape)


def coefficients(products: Sequence[Sequence[float]], values: Values) -> Sequence[float] | None:
    """See `Coefficients.__call__`: of the differences from the base, each tensor one vector."""
    if values["filter_wise"]:
        return None
    n = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    cosines = [
        products[i][j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
        for i, j in itertools.combinations(range(n), 2)
    ]
    cos = max(0.0, min(1.0, sum(cosines) / len(cosines)))
    return [cos / (1 + (n - 1) * cos)] * n


def _rows(x: Tensor, *, by_filter: bool) -> Tensor:
    """[rows, length]: one row, or the vectors along the last axis."""
    return x.reshape(-1, x.shape[-1]) if by_filter and x.dim() > 1 else x.reshape(1, -1)


def _mix(base: Tensor, xs: Sequence[Tensor]) -> Tensor:
    deltas, n = [x - base for x in xs], len(xs)
    norms = [dot(d, d).sqrt() for d in deltas]
    cos = torch.zeros_like(norms[0])
    for i, j in itertools.combinations(range(n), 2):
        size = norms[i] * norms[j]
        cos += torch.where(size == 0, 0, dot(deltas[i], deltas[j]) / torch.where(size == 0, 1, size))
    cos = divided(cos, n * (n - 1) / 2).clamp(0, 1)
    t = n * cos / (1 + (n - 1) * cos)
    average = deltas[0]
    for d in deltas[1:]:
        average += d
    return base + divided(t, n).to(base.dtype)[:, None] * average


def _mix_as_mergekit(base: Tensor, xs: Sequence[Tensor]) -> Tensor:
    deltas, n = [x - base for x in xs], len(xs)
    cosines = []
    for a, b in itertools.combinations(deltas, 2):
        size = torch.norm(a, dim=-1) * torch.norm(b, dim=-1)
        cosines.append(((a * b).sum(dim=-1) / size.clamp(min=1e-6)).clamp(-1, 1))
    cos = torch.stack(cosines).mean(dim=0)[:, None]
    divisor = 1 + (n - 1) * cos
    t = torch.where(divisor.abs() < 1e-6, 0, n * cos / divisor)
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return t * (total / n) + (1 - t) * base


MODEL_STOCK = Method(
    name="model_stock",
    kernel=model_stock,
    coefficients=coefficients,
    params=(switch("filter_wise", False),),
    needs_base=True,
    models=(2, 1_000),
    paper="arXiv 2403.19522",
    summary="between the base and the average, by the angle between the models",
)
