"""Division of tensors by numbers with the same bits on every device.

On CUDA torch divides by a Python number by multiplying with its reciprocal, which rounds twice; by a tensor
on the device it divides, as it does on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divided(x: Tensor, divisor: float) -> Tensor:
    """Divides each element by a number, rounding once.

    Args:
        x: Any shape and float type.
        divisor: Rounded to the type of `x` first.

    Returns:
        x / divisor.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
