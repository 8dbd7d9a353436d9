"""What a process of this machine does, as /proc tells: whether it computes, was stopped, and its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessActivity:
    """What a process does.

    Attributes:
        is_stopped: whether somebody stopped it, by SIGSTOP or a debugger.
        processor_seconds: that its threads used so far.
    """

    is_stopped: bool
    processor_seconds: float


def activity(pid: int) -> ProcessActivity | None:
    """Looks at a process.

    Args:
        pid: the process.

    Returns:
        What it does; None where it is gone, or the system does not say.
    """
    try:
        state, *words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks = int(words[10]) + int(words[11])  # utime and stime
        return ProcessActivity(state in "Tt", ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None


def private_memory() -> int:
    """Bytes of its own that this process has in memory, without mapped files; 0 where unknown."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text(encoding="utf-8").split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
