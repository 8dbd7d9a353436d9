"""Multi-SLERP (Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea): weighted mean on a sphere.

The direction is that of sum_i w_i u_i, u_i = x_i / (|x_i| + eps), the length sum_i w_i |x_i|; with a base,
x_i are the differences from it. mergekit then adds the mean in the tangent space at that direction, which is
zero but for rounding, and shortens the result by cos(eps); here neither is done. Where directions cancel (a
sum no longer than eps or 1e-6) mergekit takes the weighted sum of two models and stops the merge of more;
here the weighted sum serves for any number. Weights to be normalized whose sum is 0 give no number in
mergekit; here they count as equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.methods.declaration import EQUAL_SHARE, Method, Param, Values, switch
from evomerge.methods.dot_products import combine, differences, form, gram


def multislerp(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: weighted mean direction times weighted mean length; one model stays as it is."""
    weight, eps = values["weight"], values["eps"]
    assert isinstance(weight, tuple)
    assert isinstance(eps, float)
    if len(tensors) == 1 or not tensors[0].numel():
        return tensors[0].clone()
    vectors = differences(tensors, base)
    if mergekit_compatible:
        out = _mean_as_mergekit(vectors, weight, bool(values["normalize_weights"]), eps)
    else:
        out = combine(coefficients(gram(vectors), values), vectors)
    return out if base is None else out + base


def coefficients(products: Sequence[Sequence[float]], values: Values) -> Sequence[float]:
    """See `Coefficients.__call__`: of the models; one model is left as it is, whatever its weight."""
    weight, eps, n = values["weight"], values["eps"], len(products)
    assert isinstance(weight, tuple)
    assert isinstance(eps, float)
    if n == 1:
        return [1.0]
    if values["normalize_weights"]:
        total = math.fsum(weight)
        weight = tuple(w / total for w in weight) if abs(total) >= 1e-8 else (1 / n,) * n
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    direction = [w / (norm + eps) if norm else 0.0 for w, norm in zip(weight, norms, strict=True)]
    size = math.sqrt(max(0.0, form(products, direction, direction)))
    if size <= max(eps, 1e-6):
        return weight
    length = sum(w * norm for w, norm in zip(weight, norms, strict=True))
    return [length / size * c for c in direction]


def _mean_as_mergekit(
    vectors: Sequence[Tensor], weight: Sequence[float], normalize: bool, eps: float
) -> Tensor:
    flat = torch.stack([v.reshape(-1) for v in vectors])  # [sources, numel]
    w = torch.tensor(weight, dtype=flat.dtype, device=flat.device)
    if normalize:
        w = w / w.sum()
    column = w[:, None]
    norms = torch.norm(flat, dim=-1, keepdim=True)
    units = flat / (norms + eps)
    pole = (units * column).sum(dim=0)
    size = torch.norm(pole)
    if size < eps:
        if len(vectors) > 2:
            raise CandidateError(
                "multislerp as in mergekit is undefined here: the weighted directions of the models cancel"
            )
        return vectors[0] * w[0] + vectors[1] * w[1]
    pole = pole / size
    tangents = units - (units * pole).sum(dim=-1, keepdim=True) * pole
    step = (tangents * column).sum(dim=0)
    angle = torch.norm(step) + eps
    direction = pole * torch.cos(angle) + step * (torch.sin(angle) / angle)
    out: Tensor = direction * (norms[:, 0] * w).sum()
    return out.reshape(vectors[0].shape)


MULTISLERP = Method(
    name="multislerp",
    kernel=multislerp,
    coefficients=coefficients,
    params=(
        Param("weight", 0.0, 1.0, 1.0, required=True, searched=True, start=EQUAL_SHARE),
        switch("normalize_weights", True),
        Param("eps", 0.0, 0.01, 1e-8, per="merge", hard_low=0.0, digits=8),
    ),
    needs_base=False,
    takes_base=True,
    paper="Goddard 2025",
    summary="weighted mean of directions times weighted mean of lengths",
)
