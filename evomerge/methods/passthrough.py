"""A layer taken as it is, times `scale`.

For stacks, depth up-scaling (arXiv 2312.15166) and layer routing (arXiv 2403.13187).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evomerge.methods.declaration import Method, Param, Values


def passthrough(
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    *,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `Kernel.__call__`: scale * x."""
    scale = values["scale"]
    assert isinstance(scale, tuple)
    return tensors[0] * scale[0]


PASSTHROUGH = Method(
    name="passthrough",
    kernel=passthrough,
    params=(Param("scale", 0.4, 1.5, 1.0),),
    needs_base=False,
    models=(1, 1),
    paper="arXiv 2312.15166",
    summary="one model's tensor as it is",
)
