"""SCE (Wan et al. 2024, arXiv 2408.07990): select entries that vary, weigh models, erase minorities.

Of delta_i = x_i - b, the `select_topk` share of entries with the largest variance across models is kept; a
model weighs the mean of its squared entries; at each entry only models with the sign of the sum count.

mergekit selects nothing where that share is less than one entry, or where no entry varies, as with one model;
here one entry at least is kept, and all of them if none varies. mergekit weighs models equally if their mean
squares sum to less than 1e-6, which is usual for fine-tunes, and shrinks entries whose models weigh less than
that; here only zeros are special. Of entries with equal variance the first come first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values
from evomerge.methods.dot_products import CHUNK, dot


def sce(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: b + sum_i w_i m_i delta_i / sum_i w_i m_i.

    m_i is the 0/1 mask of entries that agree in sign. The base at select_topk 0.
    """
    assert base is not None
    share = values["select_topk"]
    assert isinstance(share, float)
    if not base.numel():
        return base.clone()
    deltas = torch.stack([x.reshape(-1) - base.reshape(-1) for x in tensors])  # [sources, numel]
    mixed = _mix_as_mergekit(deltas, share) if mergekit_compatible else _mix(deltas, share)
    return base + mixed.reshape(base.shape)


def _mix(deltas: Tensor, share: float) -> Tensor:
    if share < 1:
        deltas *= _select(deltas, share)
    energy = dot(deltas, deltas)  # [sources]; the same divisor for all of them cancels
    weight = (energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(deltas))).to(
        deltas.dtype
    )[:, None]
    positive = torch.cat(
        [part.double().sum(dim=0) >= 0 for part in torch.split(deltas, max(1, CHUNK // len(deltas)), 1)]
    )
    agree = torch.where(positive, deltas > 0, deltas < 0) * weight
    divisor = agree.sum(dim=0)
    return (deltas * agree).sum(dim=0) / torch.where(divisor == 0, 1, divisor)


def _select(deltas: Tensor, share: float) -> Tensor:
    """[numel] bool: the max(1, int(share * number that vary)) entries of largest variance, else all."""
    if share <= 0:
        return torch.zeros_like(deltas[0], dtype=torch.bool)
    varies = (deltas != deltas[0]).any(dim=0)
    number = int(varies.sum())
    if number == 0:
        return torch.ones_like(varies)
    spread = torch.cat([_spread(part) for part in torch.split(deltas, max(1, CHUNK // len(deltas)), 1)])
    k = max(1, int(share * number))
    threshold = spread.kthvalue(spread.numel() - k + 1).values
    above, level = spread > threshold, spread == threshold
    return above | (level & (level.cumsum(0) <= k - above.sum()))


def _spread(deltas: Tensor) -> Tensor:
    """[numel] float64: squared differences of all pairs: the variance times a constant, 0 where all agree."""
    out = torch.zeros_like(deltas[0], dtype=torch.float64)
    for a, b in itertools.combinations(deltas.double(), 2):
        out.addcmul_(a - b, a - b)
    return out


def _mix_as_mergekit(deltas: Tensor, share: float) -> Tensor:
    if share < 1:
        keep = torch.zeros_like(deltas[0])
        variance = torch.var(deltas, dim=0, unbiased=False)
        k = int(torch.count_nonzero(variance) * share)
        if share > 0 and k > 0:
            keep[torch.topk(variance.abs(), k=k).indices] = 1
        deltas = deltas * keep
    majority = (deltas.sum(dim=0) >= 0).to(deltas.dtype) * 2 - 1
    energy = deltas.square().mean(dim=1)
    total = energy.sum().item()
    weight = torch.full_like(energy, 1) / len(deltas) if abs(total) < 1e-6 else energy / total
    agree = weight[:, None] * (deltas.sign() == majority)
    return (deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1e-6)


SCE = Method(
    name="sce",
    kernel=sce,
    params=(
        Param(
            "select_topk", 0.1, 1.0, 1.0, per="merge", hard_low=0.0, hard_high=1.0, searched=True, start=0.5
        ),
    ),
    needs_base=True,
    paper="arXiv 2408.07990",
    summary="keep entries that vary, weigh models by their change, drop the minority sign",
)
