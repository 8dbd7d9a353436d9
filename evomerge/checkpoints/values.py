"""Numbers of a parent that are none: NaN and infinities, found before anything is merged."""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.checkpoints.parent import Parent
from evomerge.errors import CheckpointError


def check_finite(name: str, parent: Parent) -> None:
    """Checks every number of a parent; reads all of it once.

    Args:
        name: Name of the parent, for the message.
        parent: The parent.

    Raises:
        CheckpointError: A tensor holds NaN or an infinite number; names it.
    """
    for tensor in parent.tensors:
        check_tensor(name, tensor, parent.tensor(tensor))


def check_tensor(name: str, tensor_name: str, tensor: Tensor) -> None:
    """Checks every number of a tensor.

    Args:
        name: Name of its model, for the message.
        tensor_name: Its own name.
        tensor: The tensor; one of whole numbers passes.

    Raises:
        CheckpointError: It holds NaN or an infinite number.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = tensor.aminmax()  # NaN is passed on; one pass, no copy
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    kind = "NaN" if bool(torch.isnan(low)) or bool(torch.isnan(high)) else "an infinite number"
    raise CheckpointError(
        f"model '{name}' holds {kind} in tensor '{tensor_name}', which every merge with it would take over; "
        "fetch the model again, or leave it out"
    )
