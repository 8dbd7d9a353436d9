"""Sums of task vectors, the frame that task arithmetic, TIES, DARE, breadcrumbs and DELLA share.

delta_i = x_i - b; s_i = sparsify(delta_i); y_i = w_i s_i; out = b + lambda * combine(y). The kernel here holds whole
tensors and works in any float type: operations and their order are those of mergekit 0.1.5, so that with `mergekit_compatible`
both give the same bits. In float32 a merge runs `evomerge.methods.fused.merge_tensor` instead, by the same formulas in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, TaskVectorSum, Values, switch

Sparsify = Callable[[Tensor, float, int, Mapping[str, float], bool], Tensor]
"""(delta, density in (0, 1), mask key, the source's own numbers, parity) -> 0/1 mask of delta's shape and dtype."""

WEIGHT = Param("weight", -0.5, 2.0, 1.0, required=True)
DENSITY = Param("density", 0.1, 1.0, 1.0, hard_low=0.0, hard_high=1.0, digits=3)
LAMBDA = Param("lambda", 0.2, 2.0, 1.0, per="merge")


def method(
    name: str,
    task_vector_sum: TaskVectorSum,
    mask: Sparsify | None = None,
    own: tuple[Param, ...] = (),
    *,
    normalize: bool,
    rescale: bool = False,
    paper: str,
    summary: str,
) -> Method:
    """A task-vector method. mask: what `task_vector_sum.sparsify` names; own: parameters that it alone has; normalize, rescale: defaults."""
    sparse = (DENSITY, switch("rescale", rescale)) if mask else ()
    return Method(
        name=name,
        kernel=partial(merge, sparsify=mask, elect_sign=task_vector_sum.elect_sign),
        task_vector_sum=task_vector_sum,
        params=(WEIGHT, LAMBDA, switch("normalize", normalize), *sparse, *own),
        needs_base=True,
        randomized=task_vector_sum.sparsify in ("random", "rank"),
        paper=paper,
        summary=summary,
    )


def merge(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
    sparsify: Sparsify | None = None,
    elect_sign: bool = False,
) -> Tensor:
    """b + lambda * (sum of weighted, sparsified task vectors), with sign election if asked. Same shape as the base."""
    assert base is not None
    weight, density = values["weight"], values.get("density", ())
    assert isinstance(weight, tuple)
    assert isinstance(density, tuple)
    deltas = torch.stack([x - base for x in tensors])  # [sources, *shape]
    if sparsify is not None:
        for i, (d, key) in enumerate(zip(density, keys, strict=True)):
            if d < 1:
                own = {name: value[i] for name, value in values.items() if isinstance(value, tuple)}
                mask = (
                    sparsify(deltas[i], d, key, own, mergekit_compatible)
                    if d > 0 and deltas[i].numel()
                    else torch.zeros_like(deltas[i])
                )
                deltas[i] = _masked(deltas[i], mask, rescale=bool(values["rescale"]))
    w = torch.tensor(weight, dtype=deltas.dtype, device=deltas.device).reshape(-1, *[1] * base.dim())
    deltas.mul_(w)
    if elect_sign:
        agree = (
            deltas.sign() == (deltas.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
        )  # exact zeros agree with no sign
        mixed = (deltas * agree).sum(dim=0)
        divisor = (w * agree).sum(dim=0)
        none = (
            divisor == 0 if mergekit_compatible else divisor.abs() < 1e-6
        )  # weights that cancel up to rounding are no divisor
        divisor = torch.where(none, 1.0, divisor)
    else:
        mixed = deltas.sum(dim=0)
        divisor = w.sum(dim=0)
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    if values["normalize"]:
        mixed = mixed / divisor
    scale = values["lambda"]
    assert isinstance(scale, float)
    if scale != 1:
        mixed = mixed * scale
    return (base + mixed).to(base.dtype)


def _masked(delta: Tensor, mask: Tensor, *, rescale: bool) -> Tensor:
    """delta * mask, scaled back to delta's L1 norm if asked (unless either norm is below 1e-7)."""
    kept = delta * mask
    if not rescale:
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
