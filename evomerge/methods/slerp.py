"""Spherical interpolation of two models (Shoemake 1985), each tensor taken as one vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values

_CHUNK = 1 << 20  # elements; mergekit sums norms and dot products by chunks of this size
_EPS = 1e-8  # a norm at or below this counts as 1
_PARALLEL = 0.9995  # above this |cosine| the arc degenerates: interpolate linearly


def slerp(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: sin((1-t)θ)/sin θ · base + sin(tθ)/sin θ · x, θ the angle between them.

    t = 0 is the base. In float32 at least, as in mergekit.
    """
    assert base is not None
    wide = torch.promote_types(base.dtype, torch.float32)
    a, b = base.reshape(1, -1).to(wide), tensors[0].reshape(1, -1).to(wide)
    t = torch.tensor(values["t"], dtype=a.dtype, device=a.device)
    if not a.numel():
        return base.clone()
    norm_a, norm_b = _norm(a), _norm(b)
    parts = [
        ((x / norm_a) * (y / norm_b)).sum(dim=1)
        for x, y in zip(torch.split(a, _CHUNK, 1), torch.split(b, _CHUNK, 1), strict=True)
    ]
    dot = torch.stack(parts).sum(dim=0).clamp(-1, 1)
    parallel = dot.abs() > _PARALLEL
    theta = torch.acos(torch.where(parallel, 0, dot))
    sin = torch.sin(theta)
    c_a = torch.where(parallel, 1 - t, torch.sin((1 - t) * theta) / sin)
    c_b = torch.where(parallel, t, torch.sin(t * theta) / sin)
    return (c_a * a + c_b * b).reshape(base.shape).to(base.dtype)


def coefficients(products: Sequence[Sequence[float]], values: Values) -> tuple[float, float]:
    """See `Coefficients.__call__`: of the base and of the model."""
    t = values["t"]
    assert isinstance(t, float)
    norms = [math.sqrt(products[i][i]) for i in range(2)]
    length = [n if n > _EPS else 1.0 for n in norms]
    dot = max(-1.0, min(1.0, products[0][1] / (length[0] * length[1])))
    if abs(dot) > _PARALLEL:
        return 1 - t, t
    theta = math.acos(dot)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _norm(v: Tensor) -> Tensor:
    parts = [torch.linalg.vector_norm(chunk, dim=1) for chunk in torch.split(v, _CHUNK, 1)]
    norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return torch.where(norm > _EPS, norm, 1)


_T = Param("t", 0.0, 1.0, 0.5, per="merge", hard_low=0.0, hard_high=1.0, required=True, searched=True)
SLERP = Method(
    name="slerp",
    kernel=slerp,
    coefficients=coefficients,
    base_is_origin=False,
    params=(_T,),
    needs_base=True,
    models=(1, 1),
    paper="Shoemake 1985",
    summary="arc between the base and one model",
)
