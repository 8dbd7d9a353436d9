"""File systems on which SQLite's write-ahead log can be used."""

from __future__ import annotations

import os
import re
from pathlib import Path

from evomerge.errors import ConfigError

LOCAL = frozenset(
    [
        "ext2",
        "ext3",
        "ext4",
        "xfs",
        "btrfs",
        "zfs",
        "f2fs",
        "bcachefs",
        "jfs",
        "reiserfs",
        "nilfs2",
        "tmpfs",
        "ramfs",
        "overlay",
        "apfs",
        "hfs",
        "ufs",
    ]
)
"""File systems of one machine, whose locks and shared memory SQLite's write-ahead log can rely on."""


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Finds the type of the file system that a folder is on.

    Args:
        folder: Any folder.
        mounts: The machine's list of mounts.

    Returns:
        Type such as 'ext4' or 'nfs4'; None where the machine does not say.
    """
    try:
        lines = mounts.read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return None
    place = os.path.realpath(folder)
    kind: str | None = None
    longest = -1
    for line in lines:  # id parent major:minor root mount-point options … - type source options
        left, _, right = line.partition(" - ")
        if len(left.split()) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
        is_above = place == point or place.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= longest:  # of two mounts on one point the later one is on top
            kind = right.split()[0]
            longest = len(point)
    return kind


def journal_mode(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Chooses SQLite's journal for a folder; $EVOMERGE_JOURNAL overrules the choice.

    Args:
        folder: Folder of a study.
        mounts: The machine's list of mounts.

    Returns:
        'WAL' on a local disk, and where the machine names no type; 'DELETE' where machines share files (NFS,
        Lustre, GPFS, FUSE, …) or the type is not known.

    Raises:
        ConfigError: $EVOMERGE_JOURNAL is another word.
    """
    forced = os.environ.get("EVOMERGE_JOURNAL", "").upper()
    if forced:
        if forced not in ("WAL", "DELETE"):
            raise ConfigError(f"$EVOMERGE_JOURNAL must be WAL or DELETE, got '{forced}'; correct or unset it")
        return forced
    kind = file_system(folder, mounts)
    return "WAL" if kind is None or kind in LOCAL else "DELETE"
