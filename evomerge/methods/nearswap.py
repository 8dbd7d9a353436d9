"""NearSwap (alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001): take over what is near.

Each entry of the base moves to the model's, by `t` at most. mergekit takes differences below 1e-6 for 1e-6,
so that at t below that it swaps entries by half; here an entry within t is always the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values


def nearswap(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: x where |x - b| <= t, elsewhere b with a step of t towards x."""
    assert base is not None
    [x] = tensors
    t = values["t"]
    assert isinstance(t, float)
    if mergekit_compatible:
        share = (t / (base - x).abs().clamp(min=1e-6)).clamp(0, 1)
        return share * x + (1 - share) * base
    delta = x - base
    return torch.where(delta.abs() <= t, x, base + delta.clamp(-t, t))


_T = Param("t", 0.0, 0.01, 1e-4, per="merge", hard_low=0.0, required=True, digits=8, searched=True)
NEARSWAP = Method(
    name="nearswap",
    kernel=nearswap,
    params=(_T,),
    needs_base=True,
    models=(1, 1),
    paper="alchemonaut 2024",
    summary="entries near the base's are taken over, others moved by a small step",
)
