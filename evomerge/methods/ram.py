"""RAM and RAM+ (arXiv 2601.13572): average what several models changed, keep in full what one changed alone.

A model changed an entry if |x - b| > `epsilon`; other entries count as the base's. RAM+ enlarges what one
model changed alone by 1 + r · min(shared / alone, alpha), from the counts of its changed entries in this
tensor. mergekit divides the counts in 32-bit floats, and by `epsilon` for a model that changed nothing alone,
which has no effect. Its result for RAM+ is in float32 even where the merge is in bfloat16, and without an
`out_dtype` its file too; so is the result here with `mergekit_compatible`, but the file has the type that the
recipe says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values

_EPSILON = Param("epsilon", 0.0, 0.001, 1e-5, per="merge", hard_low=0.0, digits=8)


def ram(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: b + at each entry the mean of the differences of the models that changed it.

    The same with and without `mergekit_compatible`.
    """
    return _reinforced(tensors, base, values, mergekit_compatible=mergekit_compatible)


def ramplus_tl(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: as `ram`, with what a model changed alone enlarged.

    The more of its changes are shared, the more.
    """
    r, alpha = values["r"], values["alpha"]
    assert isinstance(r, float)
    assert isinstance(alpha, float)
    return _reinforced(tensors, base, values, (r, alpha), mergekit_compatible=mergekit_compatible)


def _reinforced(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    plus: tuple[float, float] | None = None,
    *,
    mergekit_compatible: bool,
) -> Tensor:
    """plus: r and alpha of RAM+."""
    assert base is not None
    epsilon = values["epsilon"]
    assert isinstance(epsilon, float)
    if not base.numel():
        return base.clone()
    deltas = torch.stack([(x - base).reshape(-1) for x in tensors])  # [sources, numel]
    changed = deltas.abs() > epsilon
    deltas = deltas * changed
    count = changed.sum(dim=0)
    alone, shared = count == 1, count > 1
    unshared = deltas * alone
    if plus is not None:
        unshared = unshared * _enlarge(
            (changed & shared).sum(dim=1),
            (changed & alone).sum(dim=1),
            *plus,
            epsilon,
            deltas.dtype,
            mergekit_compatible=mergekit_compatible,
        )
    mixed = (unshared + deltas * shared / count.clamp(min=1)).sum(dim=0)
    out = base + mixed.reshape(base.shape)
    return out if mergekit_compatible else out.to(base.dtype)


def _enlarge(
    shared: Tensor,
    alone: Tensor,
    r: float,
    alpha: float,
    epsilon: float,
    dtype: torch.dtype,
    *,
    mergekit_compatible: bool,
) -> Tensor:
    """[sources, 1]: 1 + r · min(shared / alone, alpha).

    With parity in float32, to which half precision is then promoted.
    """
    ratio = shared / alone.clamp(min=epsilon) if mergekit_compatible else shared.double() / alone.clamp(min=1)
    factor = 1 + r * ratio.clamp(0, alpha)
    return (factor if mergekit_compatible else factor.to(dtype))[:, None]


RAM = Method(
    name="ram",
    kernel=ram,
    params=(_EPSILON,),
    needs_base=True,
    paper="arXiv 2601.13572",
    summary="average what several models changed, keep what one changed alone",
)
RAMPLUS_TL = Method(
    name="ramplus_tl",
    kernel=ramplus_tl,
    params=(
        Param("r", 0.0, 1.0, 0.1, per="merge", hard_low=0.0, searched=True),
        Param("alpha", 0.0, 1.0, 0.2, per="merge", hard_low=0.0, searched=True),
        _EPSILON,
    ),
    needs_base=True,
    paper="arXiv 2601.13572",
    summary="as ram, with what one model changed alone made larger",
)
