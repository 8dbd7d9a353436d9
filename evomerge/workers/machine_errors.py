"""Which errors are the machine's: all pools and the mending of old stores ask here. Text in, answers out."""

from __future__ import annotations

import re

_DEVICE_ERRORS = (
    r"CUDA error|HIP error|cuDNN|CUBLAS|CUSOLVER|NCCL|device-side assert|uncorrectable ECC|AcceleratorError"
)
_MEMORY_ERRORS = r"out of memory|MemoryError\b|DefaultCPUAllocator|bad_alloc"
# EIO, ENXIO, EAGAIN, ENOMEM, ENODEV, ENFILE, EMFILE, ENOSPC, EROFS, those of networks, ESTALE, EDQUOT
_ERRNOS = "5|6|11|12|19|23|24|28|30|100|101|102|103|104|107|108|110|111|112|113|116|121|122"
_ONLY_MACHINES = (
    rf"\[Errno (?:{_ERRNOS})\]|\(os error (?:{_ERRNOS})\)"
    r"|No space left|Too many open files|Cannot allocate memory|Read-only file system|Disk quota exceeded"
    r"|Input/output error|Stale file handle|Transport endpoint|can't start new thread"
    r"|^(?:BrokenPipe|Connection\w*)Error|NCCL|uncorrectable ECC|GPU (?:is|has been) lost|fallen off"
    r"|no CUDA-capable device|devices? \w+ busy or unavailable|device (?:was |is )?(?:lost|removed)"
)
_DEVICE = re.compile(
    _DEVICE_ERRORS + r"|GPU (?:is|has been) lost|no CUDA-capable device|device (?:was |is )?(?:lost|removed)",
    re.IGNORECASE,
)
_ONLY_MACHINE = re.compile(_ONLY_MACHINES, re.IGNORECASE)
_MEMORY = re.compile(_MEMORY_ERRORS, re.IGNORECASE)
_MACHINE = re.compile(
    "|".join((_DEVICE_ERRORS, _MEMORY_ERRORS, _ONLY_MACHINES, r"^(?:OS|Timeout|Engine)Error|\[Errno \d+\]")),
    re.IGNORECASE,
)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?", re.IGNORECASE)
_VERDICTS = ("poison: ", "timed out ", "no result after ")  # how results begin that pools made
_LONGEST_KIND = 120  # characters of an error that are compared


def is_machine_error(error: str) -> bool:
    """Whether an error may be the fault of the machine: of its device, memory, disk or network.

    Args:
        error: of an evaluation.

    Returns:
        True for those; all others are the candidate's.
    """
    return _MACHINE.search(error) is not None


def is_only_machines(error: str) -> bool:
    """Whether no candidate can cause an error: a full disk, too many open files, a lost device or network.

    Args:
        error: of an evaluation.

    Returns:
        True for those; of other machine errors it is open.
    """
    return _ONLY_MACHINE.search(error) is not None


def is_worth_retrying(error: str) -> bool:
    """Whether a stored failure may be no fault of its candidate.

    Args:
        error: of an evaluation that is a result.

    Returns:
        True for errors that may be the machine's, and for what pools decided: a time-out, dead workers.
    """
    return is_machine_error(error) or error.startswith(_VERDICTS)


def retry_advice(error: str | None) -> str:
    """What to do about a stored failure that may be no fault of its candidate.

    Args:
        error: of an evaluation that is a result; None for success.

    Returns:
        The end of a sentence; empty where nothing is to be done.
    """
    if error is None or not is_worth_retrying(error):
        return ""
    return "; that may be the machine's fault: resume with --retry-failed scores it anew"


def breaks_device(error: str) -> bool:
    """Whether a process can no longer use its device after an error.

    Args:
        error: of an evaluation.

    Returns:
        True for errors of the accelerator.
    """
    return _DEVICE.search(error) is not None


def error_kind(error: str) -> str:
    """What two errors of the same kind have in common.

    Args:
        error: of an evaluation.

    Returns:
        The first 120 characters of the text without its numbers.
    """
    return _NUMBER.sub("#", error)[:_LONGEST_KIND]


def wants_memory(error: str) -> bool:
    """Whether an error is for want of memory, which a neighbour may have taken.

    Args:
        error: of an evaluation, or its kind.

    Returns:
        True for those.
    """
    return _MEMORY.search(error) is not None
