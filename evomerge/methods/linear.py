"""Weighted average of models (Wortsman et al. 2022, Model Soups, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import EQUAL_SHARE, Method, Param, TaskVectorSum, Values, switch


def linear(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: sum_i w_i x_i, divided by sum_i w_i if `normalize`.

    A zero sum of weights gives inf or NaN, as in mergekit.
    """
    weight = values["weight"]
    assert isinstance(weight, tuple)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)  # as mergekit, whatever the dtype
    w = torch.tensor(weight, dtype=dtype, device=tensors[0].device)
    out = torch.zeros_like(tensors[0], dtype=dtype)
    for x, w_i in zip(tensors, w, strict=True):
        out.addcmul_(x.to(dtype), w_i)
    if values["normalize"]:
        out.div_(w.sum())
    return out.to(tensors[0].dtype)


_WEIGHT = Param("weight", 0.0, 1.0, 1.0, required=True, searched=True, start=EQUAL_SHARE)
LINEAR = Method(
    name="linear",
    kernel=linear,
    task_vector_sum=TaskVectorSum(without_base=True),
    params=(_WEIGHT, switch("normalize", True)),
    needs_base=False,
    paper="arXiv 2203.05482",
    summary="weighted average",
)
