"""Derivatives of a loss by the coefficients of a sum of task vectors, from its gradient by the merged tensor.

out = b + lambda * S / D with S = sum_i w_i s_i, s_i = mask_i * (x_i - b) and D = 1 or, with `normalize`, the
sum of the weights; with sign election both sums run over what agrees at an element. With the gradient G of
the loss by `out`, dL/dw_i = lambda <G, s_i / D - S / D^2> (without the second term where D is 1) and
dL/dlambda = <G, S / D>. Masks and elected signs are held: what a small step would change in them is missing,
which is nothing without densities below 1 and without election. Differences are formed in float32 inside the
dot products and these are summed in float64, since <G, x_i> - <G, b> cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, TaskVectorSum, Values
from evomerge.methods.fused.one_pass import projections
from evomerge.methods.task_vectors import agreement, sparsify

Slope = float | tuple[float, ...]
"""The derivative by a parameter of the merge, or those by a parameter of each model."""
_NO_DIVISOR = {True: 1e-6, False: 1e-8}  # by election: below this a sum of weights counts as 1


def has_slopes(rule: Method) -> bool:
    """Whether a method is a sum of task vectors with weights, whose derivatives are known.

    Args:
        rule: The method.

    Returns:
        True if `slopes` takes it.
    """
    return rule.task_vector_sum is not None and rule.param("weight") is not None


def slopes(
    rule: Method,
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    gradient: Tensor,
) -> dict[str, Slope]:
    """Computes the derivatives of a loss by the weights and by lambda for one tensor.

    Args:
        rule: A method that `has_slopes`.
        tensors: One per source, all of one shape, in any float type.
        base: The base model's tensor; None for a method without a base.
        values: The method's parameter values for this tensor.
        keys: One signed 64-bit mask key per source.
        gradient: Of the loss by the merged tensor, of its shape.

    Returns:
        'weight' -> one number a source; 'lambda' -> a number, where the method has it.
    """
    assert rule.task_vector_sum is not None
    weight, factor = values["weight"], values.get("lambda", 1.0)
    assert isinstance(weight, tuple)
    assert isinstance(factor, float)
    if is_plain(rule, values):
        origin = None if rule.task_vector_sum.without_base else base
        return slopes_of_products(values, projections(gradient, origin, tensors))
    gradient = gradient.float()
    parts = _parts(rule.task_vector_sum, tensors, base, values, keys)  # [sources, *shape]
    w = torch.tensor(weight, dtype=torch.float32, device=parts.device).reshape(-1, *[1] * gradient.dim())
    counts: Tensor | None = None  # at each element, which weights are in the divisor; None for all
    if rule.task_vector_sum.elect_sign:
        counts = agreement(parts * w)
        parts = parts * counts
    if not values["normalize"]:
        by_weight = [factor * _dot(gradient, part) for part in parts]
        total = _dot(gradient, (parts * w).sum(dim=0))
    else:
        mixed = (parts * w).sum(dim=0)
        divisor = w.sum(dim=0) if counts is None else (w * counts).sum(dim=0)
        none = divisor.abs() < _NO_DIVISOR[counts is not None]
        divisor = torch.where(none, 1.0, divisor)
        scaled, mixed = gradient / divisor, mixed / divisor
        moves = torch.where(none, 0.0, 1.0)  # a divisor that counts as 1 does not move
        by_weight = [
            factor * _dot(scaled, part - mixed * moves * (1.0 if counts is None else counts[i]))
            for i, part in enumerate(parts)
        ]
        total = _dot(gradient, mixed)
    found: dict[str, Slope] = {"weight": tuple(by_weight)}
    if "lambda" in values:
        found["lambda"] = total
    return found


def is_plain(rule: Method, values: Values) -> bool:
    """Whether task vectors are summed as they are: none is masked and no sign elected.

    Then the derivatives follow from one dot product a source, in which rows without a gradient have no part.

    Args:
        rule: A method that `has_slopes`.
        values: The method's parameter values for a tensor.

    Returns:
        True if they are.
    """
    summed = rule.task_vector_sum
    assert summed is not None
    if summed.elect_sign:
        return False
    densities = values.get("density", ())
    assert isinstance(densities, tuple)
    return summed.sparsifier is None or all(density >= 1 for density in densities)


def slopes_of_products(values: Values, products: Sequence[float]) -> dict[str, Slope]:
    """Computes the derivatives of a sum that `is_plain` from the dot products of the gradient.

    Args:
        values: The method's parameter values for this tensor.
        products: <gradient, task vector> of each source.

    Returns:
        As `slopes`.
    """
    weight, factor = values["weight"], values.get("lambda", 1.0)
    assert isinstance(weight, tuple)
    assert isinstance(factor, float)
    total = math.fsum(w * dot for w, dot in zip(weight, products, strict=True))
    by_weight = [factor * dot for dot in products]
    if values["normalize"]:
        divisor = math.fsum(weight)
        if abs(divisor) >= _NO_DIVISOR[False]:
            total /= divisor
            by_weight = [factor * (dot - total) / divisor for dot in products]
    found: dict[str, Slope] = {"weight": tuple(by_weight)}
    if "lambda" in values:
        found["lambda"] = total
    return found


def by_source(
    sources: Sequence[tuple[str, object]], slopes: Mapping[str, Slope]
) -> dict[tuple[str, str], float]:
    """Names the derivatives by each source's parameter.

    Args:
        sources: (model, whatever is taken of it) of each.
        slopes: Result of `slopes`.

    Returns:
        (parameter, source model) -> derivative; the model is '' for a parameter of the merge.
    """
    found: dict[tuple[str, str], float] = {}
    for name, slope in slopes.items():
        if isinstance(slope, tuple):
            found |= {(name, model): own for (model, _), own in zip(sources, slope, strict=True)}
        else:
            found[name, ""] = slope
    return found


def _parts(
    task_vector_sum: TaskVectorSum,
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
) -> Tensor:
    """[sources, *shape] what the weights multiply, in float32."""
    if task_vector_sum.without_base:
        return torch.stack([tensor.float() for tensor in tensors])
    assert base is not None
    origin = base.float()
    parts = torch.stack([tensor.float() - origin for tensor in tensors])
    if task_vector_sum.sparsifier is not None:
        sparsify(parts, task_vector_sum.sparsifier, values, keys)
    return parts


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
