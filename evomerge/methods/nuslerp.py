"""NuSLERP (mergekit): spherical interpolation of two models or of their differences from a base.

The arc is that of Shoemake 1985.

A tensor is one vector (`nuslerp_flatten`) or many: those along its last axis, or along its first if
`nuslerp_row_wise`, which counts only where the tensor is not one vector.

mergekit measures angles in the dtype of the merge and takes a vector of no length for one at a right angle.
Here angles are measured in 64-bit floats, a vector of no length is mixed in linearly, and so are opposite
ones, up to an angle whose sine is the square root of the dtype's precision, since no single arc joins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import EQUAL_SHARE, Method, Param, Values, switch
from evomerge.methods.dot_products import differences, dot


def nuslerp(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: the point at t = w_2 / (w_1 + w_2) of the arc from x_1 to x_2.

    At t = 1/2 if the weights sum to 0.
    """
    weight = values["weight"]
    assert isinstance(weight, tuple)
    first = tensors[0]
    if not first.numel():
        return first.clone()
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    by_column = bool(values["nuslerp_row_wise"]) and not values["nuslerp_flatten"]
    x, y = differences(tensors, base)
    if values["nuslerp_flatten"]:
        x, y = x.reshape(-1), y.reshape(-1)
    elif by_column:
        x, y = x.transpose(0, -1), y.transpose(0, -1)
    out = _arc_as_mergekit(x, y, t) if mergekit_compatible else _arc(x, y, t)
    if by_column:
        out = out.transpose(0, -1)
    out = out.reshape(first.shape)
    return out if base is None else base + out


def coefficients(products: Sequence[Sequence[float]], values: Values) -> tuple[float, float] | None:
    """See `Coefficients.__call__`: of the two models, each tensor one vector."""
    weight = values["weight"]
    assert isinstance(weight, tuple)
    if not values["nuslerp_flatten"]:
        return None
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    size = math.sqrt(products[0][0] * products[1][1])
    theta = math.acos(max(-1.0, min(1.0, products[0][1] / size))) if size else 0.0
    if math.sin(theta) <= torch.finfo(torch.float32).eps ** 0.5:
        return 1 - t, t
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _arc(x: Tensor, y: Tensor, t: float) -> Tensor:
    """For each pair of vectors of x and y [..., length]: sin((1-t)θ)/sin θ · x + sin(tθ)/sin θ · y."""
    length = x.shape[-1] if x.dim() else 1
    a, b = x.reshape(-1, length), y.reshape(-1, length)
    size = (dot(a, a) * dot(b, b)).sqrt()
    none = size == 0
    theta = torch.acos((dot(a, b) / torch.where(none, 1, size)).clamp(-1, 1))
    sin = torch.sin(theta)
    straight = none | (sin <= torch.finfo(x.dtype).eps ** 0.5)
    c_a, c_b = (
        torch.where(straight, part, torch.sin(part * theta) / sin).to(x.dtype)[:, None] for part in (1 - t, t)
    )
    return (c_a * a + c_b * b).reshape(x.shape)


def _arc_as_mergekit(x: Tensor, y: Tensor, t: float) -> Tensor:
    unit_x, unit_y = (v / torch.norm(v, dim=-1, keepdim=True).clamp(min=1e-7) for v in (x, y))
    cos = (unit_x * unit_y).sum(dim=-1, keepdim=True).clamp(-1, 1)
    straight = 1 - cos.square() <= 1e-16
    theta = torch.acos(cos.masked_fill(straight, 0))
    curved = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
    return torch.where(straight, (1 - t) * x + t * y, curved)


NUSLERP = Method(
    name="nuslerp",
    kernel=nuslerp,
    coefficients=coefficients,
    params=(
        Param("weight", 0.0, 1.0, 1.0, required=True, searched=True, start=EQUAL_SHARE),
        switch("nuslerp_flatten", True),
        switch("nuslerp_row_wise", False),
    ),
    needs_base=False,
    takes_base=True,
    models=(2, 2),
    paper="Shoemake 1985",
    summary="arc between two models, or between their differences from a base",
)
