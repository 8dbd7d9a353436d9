"""Sums of task vectors: what task arithmetic, TIES, DARE, breadcrumbs and DELLA have in common.

delta_i = x_i - b; s_i = mask_i * delta_i; y_i = w_i s_i; out = b + lambda * combine(y). The kernel here holds
whole tensors and works in any float type: operations and their order are those of mergekit 0.1.5, so that
with `mergekit_compatible` both give the same bits. In float32 a merge runs
`evomerge.methods.fused.merge_tensor` instead, by the same formulas in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from evomerge.methods.declaration import (
    EQUAL_SHARE,
    Method,
    Param,
    Sparsifier,
    TaskVectorSum,
    Values,
    switch,
)

WEIGHT = Param("weight", -0.5, 2.0, 1.0, required=True, searched=True, start=EQUAL_SHARE)
DENSITY = Param("density", 0.1, 1.0, 1.0, hard_low=0.0, hard_high=1.0, digits=3, searched=True, start=0.5)
LAMBDA = Param("lambda", 0.2, 2.0, 1.0, per="merge")


def task_vector_method(
    name: str,
    task_vector_sum: TaskVectorSum,
    own_params: tuple[Param, ...] = (),
    *,
    normalize: bool,
    rescale: bool = False,
    paper: str,
    summary: str,
) -> Method:
    """Declares a method that is a sum of task vectors.

    Args:
        name: As recipes and search files spell it.
        task_vector_sum: How the task vectors are sparsified and summed.
        own_params: Parameters besides weight, lambda, normalize and, with a sparsifier, density and rescale.
        normalize: Whether the sum is divided by the sum of the weights where a recipe does not say.
        rescale: Whether what a mask leaves over gets the norm of the whole where a recipe does not say.
        paper: Where it was published.
        summary: A line for the documentation.

    Returns:
        The method, with `merge_task_vectors` as its kernel.
    """
    sparsifier = task_vector_sum.sparsifier
    sparse_params = (DENSITY, switch("rescale", rescale)) if sparsifier else ()
    kernel = partial(merge_task_vectors, sparsifier=sparsifier, elect_sign=task_vector_sum.elect_sign)
    return Method(
        name=name,
        kernel=kernel,
        task_vector_sum=task_vector_sum,
        params=(WEIGHT, LAMBDA, switch("normalize", normalize), *sparse_params, *own_params),
        needs_base=True,
        randomized=sparsifier is not None and sparsifier.randomized,
        paper=paper,
        summary=summary,
    )


def merge_task_vectors(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
    sparsifier: Sparsifier | None = None,
    elect_sign: bool = False,
) -> Tensor:
    """b + lambda * (sum of weighted, sparsified task vectors), with sign election if wanted.

    Args:
        tensors: One per source, all of one shape and floating dtype.
        base: The base model's tensor, of the same shape and dtype.
        values: weight, lambda, normalize; with a sparsifier also density, rescale and its own.
        keys: One signed 64-bit mask key per source.
        mergekit_compatible: Give mergekit 0.1.5's bits.
        sparsifier: Which entries of the task vectors stay; None for all of them.
        elect_sign: Sum only what has the sign of the sum.

    Returns:
        A new tensor of the base's shape and dtype.
    """
    assert base is not None
    weight, factor = values["weight"], values["lambda"]
    assert isinstance(weight, tuple)
    assert isinstance(factor, float)
    deltas = torch.stack([x - base for x in tensors])  # [sources, *shape]
    if sparsifier is not None:
        sparsify(deltas, sparsifier, values, keys, mergekit_compatible)
    w = torch.tensor(weight, dtype=deltas.dtype, device=deltas.device).reshape(-1, *[1] * base.dim())
    deltas.mul_(w)
    if elect_sign:
        mixed, divisor = _agreeing_sum(deltas, w, mergekit_compatible)
    else:
        mixed = deltas.sum(dim=0)
        divisor = w.sum(dim=0)
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    if values["normalize"]:
        mixed = mixed / divisor
    if factor != 1:
        mixed = mixed * factor
    return (base + mixed).to(base.dtype)


def sparsify(
    deltas: Tensor,
    sparsifier: Sparsifier,
    values: Values,
    keys: Sequence[int],
    mergekit_compatible: bool = False,
) -> None:
    """Masks each source's task vector in place.

    Args:
        deltas: [sources, *shape] task vectors.
        sparsifier: Which entries stay.
        values: The method's parameter values.
        keys: One signed 64-bit mask key per source.
        mergekit_compatible: Give mergekit 0.1.5's bits.
    """
    densities, rescale = values["density"], bool(values["rescale"])
    assert isinstance(densities, tuple)
    for i, (density, key) in enumerate(zip(densities, keys, strict=True)):
        if density >= 1:
            continue
        delta = deltas[i]
        if density > 0 and delta.numel():
            own = {name: value[i] for name, value in values.items() if isinstance(value, tuple)}
            mask = sparsifier.mask(delta, density, key, own, mergekit_compatible)
        else:
            mask = torch.zeros_like(delta)
        deltas[i] = _masked(delta, mask, rescale=rescale)


def _masked(delta: Tensor, mask: Tensor, *, rescale: bool) -> Tensor:
    """delta * mask, with `rescale` scaled back to delta's L1 norm (unless either norm is below 1e-7)."""
    left = delta * mask
    if not rescale:
        return left
    norm_before, norm_after = delta.abs().sum(), left.abs().sum()
    if norm_before < 1e-7 or norm_after < 1e-7:
        return left
    return left * (norm_before / norm_after)


def agreement(terms: Tensor) -> Tensor:
    """Which terms have the sign of their sum.

    Args:
        terms: [sources, *shape] weighted task vectors.

    Returns:
        [sources, *shape] of bool; an exact zero agrees with no sign.
    """
    majority = (terms.sum(dim=0) >= 0).to(terms.dtype) * 2 - 1
    return terms.sign() == majority


def _agreeing_sum(terms: Tensor, w: Tensor, mergekit_compatible: bool) -> tuple[Tensor, Tensor]:
    """(sum of the terms [sources, *shape] that have the sign of the whole sum, sum of their weights)."""
    agree = agreement(terms)
    mixed = (terms * agree).sum(dim=0)
    divisor = (w * agree).sum(dim=0)
    # weights that cancel up to rounding are no divisor
    none = divisor == 0 if mergekit_compatible else divisor.abs() < 1e-6
    return mixed, torch.where(none, 1.0, divisor)
