"""A user's Python function as the loss of a Python task, which a learned stage goes down.

It is called as `loss(model, items)` or `loss(model, tokenizer, items)`, with the ids of the items, and gives
a torch scalar for each of them, or one for all: their mean. It runs in this process with the user's rights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import CandidateError


def losses(
    call: Callable[..., Any], name: str, count: int, model: nn.Module, tokenizer: Any, items: Sequence[str]
) -> tuple[Tensor, list[float]]:
    """Calls a loss.

    Args:
        call: The function.
        name: Of its task.
        count: How many arguments it takes.
        model: Live model.
        tokenizer: Its tokenizer.
        items: Ids of the items, at least one.

    Returns:
        The sum of the items' losses, with its graph where gradients are enabled, and the loss of each.

    Raises:
        CandidateError: It gives no finite scalars, or not one for each item.
    """
    arguments = (model, tuple(items)) if count == 2 else (model, tokenizer, tuple(items))
    result = call(*arguments)
    if isinstance(result, Mapping):
        missing = [item for item in items if item not in result]
        if missing or len(result) != len(items):
            raise CandidateError(
                f"the loss of python task '{name}' gave {len(result)} losses for {len(items)} items; it must "
                f"give one for each{f', and none for {missing[0]!r}' if missing else ''}"
            )
        parts = [_scalar(result[item], name) for item in items]
        total = torch.stack([part.double() for part in parts]).sum()
    else:
        part = _scalar(result, name)
        parts = [part] * len(items)
        total = part.double() * len(items)
    values = [float(part.detach()) for part in parts]
    if not all(map(math.isfinite, values)):
        raise CandidateError(f"the loss of python task '{name}' is not finite")
    return total, values


def _scalar(value: Any, name: str) -> Tensor:
    """The value itself; raises CandidateError where it is no torch scalar that has a gradient."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CandidateError(
            f"the loss of python task '{name}' gave {type(value).__name__}; it must give a torch scalar for "
            "each item, or one for all"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise CandidateError(
            f"the loss of python task '{name}' has no gradient by the model's weights; compute it in torch "
            "from the model's outputs, without torch.no_grad"
        )
    return value.reshape(())
