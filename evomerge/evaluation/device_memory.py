"""What to do where a card has too little memory: give back what nothing uses, and try once more with less."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def free_unused() -> None:
    """Gives back what torch keeps of a card's memory though nothing uses it. Does nothing without a card."""
    gc.collect()  # tensors of modules and frames that refer to themselves
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def tried_again(compute: Callable[[], _Result], take_less: Callable[[], bool]) -> _Result:
    """Computes something; where a card has too little memory for it, once more with less of it.

    Args:
        compute: What to compute, so that it can be begun anew.
        take_less: Arranges that the next time takes less memory; False where that cannot be.

    Returns:
        What is computed.

    Raises:
        torch.OutOfMemoryError: Less was not enough, or there is no less.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        if not take_less():
            raise
    free_unused()  # the frames of the error, which hold a forward's tensors, are gone by now
    return compute()
