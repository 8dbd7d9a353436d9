"""What a failure of a worker means, and when to give up on what. Knows nothing of queues and of Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DEAD = (
    r"CUDA error|HIP error|cuDNN|CUBLAS|CUSOLVER|NCCL|device-side assert|uncorrectable ECC|AcceleratorError"
)
_DEVICE = re.compile(_DEAD, re.IGNORECASE)
_MACHINE = re.compile(
    _DEAD
    + r"|out of memory|^MemoryError|DefaultCPUAllocator|^OSError|^(?:BrokenPipe|Connection\w*|Timeout)Error"
    r"|\[Errno \d+\]|Input/output error|Stale file handle|No space left",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on what. Times in seconds, sizes in bytes.

    floor, factor: a job may take max(floor, factor x running median of seconds per cost x its cost); first: while none has
    finished; opening: a worker's start. poison: workers that die of one job before that is its result; hangs: time-outs of it; tries: whatever
    they ended by. strikes: failures in a row at a device of jobs that were then done elsewhere, before it is put aside. breaker: failures in a row
    with no job done by anyone (at least three for each worker), before the pool gives up; openings: the same for
    workers that could not start, while none ever could (at least one for each). memory: bytes that a worker may grow by after its first
    job, before it is replaced; None: as much as it had then, and a GiB. backoff: before a worker that failed is started again,
    doubled each time up to longest_backoff. alone: how long devices stay aside with no other at work.
    """

    floor: float = 60.0
    factor: float = 4.0
    first: float = 14_400.0
    opening: float = 3_600.0
    poison: int = 3
    hangs: int = 2
    tries: int = 20
    strikes: int = 5
    breaker: int = 30
    openings: int = 3
    memory: float | None = None
    backoff: float = 1.0
    longest_backoff: float = 60.0
    alone: float = 120.0


def is_machines(error: str) -> bool:
    """Whether an evaluation's error may be the machine's fault: of its device, memory, disk or network. Others are the candidate's."""
    return _MACHINE.search(error) is not None


def breaks_device(error: str) -> bool:
    """Whether a process can no longer use its device after this error."""
    return _DEVICE.search(error) is not None


def kind(error: str) -> str:
    """What two errors of the same kind have in common: the text without its numbers."""
    return _NUMBER.sub("#", error)[:120]
