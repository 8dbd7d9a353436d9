"""Arcee Fusion (mergekit): take over the entries whose change matters most.

Importance is |x - b| times KL(softmax x, softmax b) of the vector along the last axis that holds the entry;
the model's entry is taken where importance is at least median + 1.5 (q3 - q1).

mergekit finds the quantiles of tensors above a million entries from a random sample, anew each time; here
they are those of all entries, also when asked for mergekit's behaviour. mergekit adds 1e-8 to probabilities
and computes in the dtype of the merge, where the divergence of near models is rounding and may be negative;
here it is exact. Its result is in float32 even where the merge is in bfloat16, and without an `out_dtype` its
file too; so is the result here with `mergekit_compatible`, but the file has the type that the recipe says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Values
from evomerge.methods.dot_products import CHUNK


def arcee_fusion(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: the model's entries where its change matters, the base's elsewhere."""
    assert base is not None
    [x] = tensors
    if not base.numel():
        return base.clone()
    divergence = _divergence_as_mergekit(x, base) if mergekit_compatible else _divergence(x, base)
    importance = (x - base).abs() * divergence
    q1, median, q3 = _quartiles(importance)
    threshold = median + 1.5 * (q3 - q1)
    if mergekit_compatible:
        return base + (x - base) * (importance >= threshold).float()
    return torch.where(importance < threshold, base, x)  # NaN is taken over, so that it is seen


def _quartiles(x: Tensor) -> list[Tensor]:
    """Scalars: the entries of x at a quarter, a half and three quarters of its order, rounded down."""
    flat, last = x.reshape(-1), x.numel() - 1
    return [flat.kthvalue(quarter * last // 4 + 1).values for quarter in (1, 2, 3)]


def _divergence(x: Tensor, base: Tensor) -> Tensor:
    """[..., 1]: KL(softmax x, softmax b) along the last axis, in 64-bit floats, some rows at a time."""
    length = x.shape[-1] if x.dim() else 1
    parts = []
    for a, b in zip(
        *(torch.split(t.reshape(-1, length), max(1, CHUNK // length)) for t in (x, base)), strict=True
    ):
        log_p, log_q = (torch.log_softmax(t.double(), dim=-1) for t in (a, b))
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0))
    return torch.cat(parts).reshape([*x.shape[:-1], 1] if x.dim() else []).to(x.dtype)


def _divergence_as_mergekit(x: Tensor, base: Tensor) -> Tensor:
    p, q = (torch.softmax(t, dim=-1) + 1e-8 for t in (x, base))
    return (p * (p / q).log()).sum(dim=-1, keepdim=True)


ARCEE_FUSION = Method(
    name="arcee_fusion",
    kernel=arcee_fusion,
    params=(),
    needs_base=True,
    models=(1, 1),
    paper="mergekit",
    summary="entries whose change matters most are taken over",
)
