"""How much memory this machine has for a process: /proc/meminfo, and the limits of its control groups.

`MemAvailable` counts the page cache, which is given up where memory is wanted; the number of free pages does
not, so that a machine that has just read its models would seem to have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NAMES = {"MemTotal": "total", "MemAvailable": "available"}
_UNKNOWN = 1 << 29  # bytes that count as available where the system does not say
_VERSIONS = (  # folder below /sys/fs/cgroup, limit, usage, prefix of the keys of memory.stat
    ("", "memory.max", "memory.current", ""),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of a machine, or of the part of it that a process may use.

    Attributes:
        total: Bytes; the limit of a control group where that is less than the machine has. 0 where unknown.
        available: Bytes that can be had without swapping, page cache included; None where unknown.
    """

    total: int
    available: int | None


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Reads the memory that this process may use.

    The control groups of version 1 and 2 that the process is in are asked, and those around them.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        Total and available bytes, as far as the system says.
    """
    memory = _meminfo(root)
    for folder, (limit_name, usage_name, prefix) in _groups(root):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or not 0 < limit < (memory.total or limit + 1):
            continue
        if usage is None:
            memory = HostMemory(limit, memory.available)
            continue
        free = max(0, limit - max(0, usage - _page_cache(folder, prefix)))
        memory = HostMemory(limit, free if memory.available is None else min(memory.available, free))
    return memory


def available_memory() -> int:
    """Bytes of this machine's memory that can be had now; half a gigabyte where the system does not say."""
    available = host_memory().available
    if available is not None:
        return available
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return _UNKNOWN


def _meminfo(root: Path) -> HostMemory:
    """Total and available memory of the whole machine."""
    found: dict[str, int] = {}
    try:
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            if name in _NAMES:
                found[_NAMES[name]] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return HostMemory(found.get("total", 0), found.get("available"))


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the control groups around this process, each with the names of its files.

    In a container the path may be one of the machine's that is not there; its root is then the container's.
    """
    paths: dict[str, str] = {}  # version's folder -> path
    try:
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                paths[""] = path
            elif "memory" in controllers.split(","):
                paths["memory"] = path
    except (OSError, ValueError):
        pass
    for folder, *names in _VERSIONS:
        own = PurePosixPath(paths.get(folder, "/").lstrip("/"))
        for group in (own, *own.parents):
            limit, usage, prefix = names
            yield root / "sys/fs/cgroup" / folder / group, (limit, usage, prefix)


def _page_cache(folder: Path, prefix: str) -> int:
    """Bytes of a control group's usage that are pages of files, which it gives up where memory is wanted."""
    try:
        rows = dict(
            line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        return sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):
        return 0


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, or it says 'max'."""
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
