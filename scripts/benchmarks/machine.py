"""What a result in results/ was made with: date, processor, memory, Python, versions of libraries, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def today() -> str:
    """The date in UTC, such as 2025-01-31."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def processor() -> str:
    """The processor's model name, its architecture where the system does not say."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory in GiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def versions(packages: Iterable[str]) -> str:
    """'torch 2.9.0, numpy 2.3.1' of the installed packages."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def commit() -> str:
    """The short hash of the checked-out commit, 'unknown' outside a Git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def stamp(*packages: str) -> str:
    """One sentence part on the run: date, machine, Python, the versions of these packages and of evomerge."""
    return (
        f"{today()}, {processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, "
        f"Python {platform.python_version()}, {versions(('evomerge', *packages))}, commit {commit()}"
    )
