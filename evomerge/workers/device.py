"""The device of a worker: how exactly it computes, which card it is, what magnitude tables may take of it."""

from __future__ import annotations

from typing import Any

import torch

from evomerge.merging.host_memory import available_memory

_TABLES_SHARE = 4  # magnitude tables may take one part in so many of the free memory


def compute_in_full_precision() -> None:
    """Sets torch, for this process, to compute matrix products and their sums in the types that they have.

    TF32 would round float32 factors to 10 bits. Reductions in float16 and bfloat16 would round partial sums
    wherever a kernel splits a long sum, which depends on the shape of a batch. Nothing changes on a CPU.
    """
    torch.set_float32_matmul_precision("highest")
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False


def card(device: str) -> dict[str, str]:
    """Which card a device is: kinds of cards have other kernels, so that scores differ in their last bits.

    Args:
        device: torch's name of the device.

    Returns:
        'card', the driver's name for it, and 'capability', such as '9.0'; nothing for what is no card.
    """
    if not device.startswith("cuda"):
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {"card": properties.name, "capability": f"{properties.major}.{properties.minor}"}


def tables_memory(device: str, placed: int) -> int:
    """Memory that magnitude tables may take: a part of what is free where merges are computed.

    Args:
        device: torch's name of the device that merges.
        placed: Bytes of the parents that will be copied to it.

    Returns:
        Bytes of the card's memory, on a CPU of the machine's.
    """
    free = torch.cuda.mem_get_info(device)[0] - placed if device.startswith("cuda") else available_memory()
    return max(0, free) // _TABLES_SHARE
