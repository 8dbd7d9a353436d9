"""Karcher mean (arXiv 2603.04972): the point of the sphere nearest to all models, times their mean length.

Every model has the same weight and the base, if mergekit is given one, is one more model. `max_iter` is a
count; a fraction is cut off.

mergekit iterates over whole tensors in the dtype of the merge, where small angles are rounding; here the mean
is kept as coefficients of the models and iterated in 64-bit floats. mergekit drops tensors shorter than
`tol`, and of only such gives zeros; here only tensors of no length are dropped. Where directions cancel it
starts at the first model and may follow rounding; here the result is then the plain average, and a model
opposite to the mean pulls nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values
from evomerge.methods.dot_products import combine, form, gram


def karcher(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: mean length times the Riemannian mean of the directions.

    Found by steps in the tangent space at the last guess.
    """
    steps, tol = values["max_iter"], values["tol"]
    assert isinstance(steps, float)
    assert isinstance(tol, float)
    if len(tensors) == 1 or not tensors[0].numel():
        return tensors[0].clone()
    if mergekit_compatible:
        return _mean_as_mergekit(tensors, int(steps), tol)
    return combine(coefficients(gram(tensors), values), tensors)


def coefficients(products: Sequence[Sequence[float]], values: Values) -> Sequence[float]:
    """See `Coefficients.__call__`: of the models; one model is left as it is."""
    steps, tol, n = values["max_iter"], values["tol"], len(products)
    assert isinstance(steps, float)
    assert isinstance(tol, float)
    if n == 1:
        return [1.0]
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    length = math.fsum(norms) / len(norms)
    present = [i for i, norm in enumerate(norms) if norm]
    if not present:
        return [0.0] * n
    cosines = [[products[i][j] / (norms[i] * norms[j]) for j in present] for i in present]
    mean = [1 / len(present)] * len(present)  # coefficients of the unit vectors of `present`
    size = math.sqrt(max(0.0, form(cosines, mean, mean)))
    if size < 1e-6:
        return [1 / n] * n
    mean = [c / size for c in mean]
    for _ in range(int(steps)):
        step = _pull(cosines, mean)
        angle = math.sqrt(max(0.0, form(cosines, step, step)))
        if angle < tol or angle == 0:
            break
        mean = [math.cos(angle) * c + math.sin(angle) / angle * s for c, s in zip(mean, step, strict=True)]
        size = math.sqrt(form(cosines, mean, mean))
        mean = [c / size for c in mean]
    out = [0.0] * n
    for i, c in zip(present, mean, strict=True):
        out[i] = length / norms[i] * c
    return out


def _pull(cosines: list[list[float]], mean: Sequence[float]) -> list[float]:
    """Coefficients of the average of log_mean(u_i), the tangent vectors that lead from the mean to u_i."""
    pull = [0.0] * len(mean)
    for i, row in enumerate(cosines):
        cos = max(-1.0, min(1.0, sum(c * m for c, m in zip(row, mean, strict=True))))
        angle = math.acos(cos)
        if math.sin(angle) < 1e-6:
            if cos < 0:
                continue  # opposite: no shortest way
            ratio = 1.0
        else:
            ratio = angle / math.sin(angle)
        pull[i] += ratio / len(mean)
        pull = [p - ratio / len(mean) * cos * m for p, m in zip(pull, mean, strict=True)]
    return pull


def _mean_as_mergekit(tensors: Sequence[Tensor], steps: int, tol: float) -> Tensor:
    dtype = tensors[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def norm(v: Tensor) -> Tensor:
        out: Tensor = torch.linalg.vector_norm(v.to(wide))
        return out

    share = 1.0 / len(tensors)
    norms = [norm(x) for x in tensors]
    units = [(x / n).to(dtype) for x, n in zip(tensors, norms, strict=True) if n.item() > tol]
    if not units:
        return torch.zeros_like(tensors[0])
    alpha = share / sum([share] * len(units))
    mean = torch.zeros_like(tensors[0])
    for u in units:
        mean += alpha * u
    size = norm(mean)
    mean = units[0].clone() if size.item() < tol else (mean / size).to(dtype)
    for _ in range(steps):
        step = torch.zeros_like(mean)
        for u in units:
            cos = torch.dot(mean.flatten(), u.flatten()).clamp(-1.0, 1.0)
            angle = torch.arccos(cos)
            if angle.item() >= tol:
                step += alpha * (angle / torch.sin(angle)) * (u - cos * mean)
        angle = norm(step)
        if angle.item() < tol:
            break
        mean = (torch.cos(angle) * mean + torch.sin(angle) * (step / angle)).to(dtype)
        size = norm(mean)
        if size.item() > tol:
            mean = (mean / size).to(dtype)
    length = torch.zeros_like(norms[0])
    for n in norms:
        length = length + share * n
    return (length * mean).to(dtype)


KARCHER = Method(
    name="karcher",
    kernel=karcher,
    coefficients=coefficients,
    params=(
        Param("max_iter", 1.0, 10.0, 10.0, per="merge", hard_low=0.0, digits=0),
        Param("tol", 0.0, 0.01, 1e-5, per="merge", hard_low=0.0, digits=8),
    ),
    needs_base=False,
    paper="arXiv 2603.04972",
    summary="mean of directions on the sphere, times the mean length",
)
