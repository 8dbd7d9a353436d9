"""File systems on which SQLite's write-ahead log can be used."""

from __future__ import annotations

import os
import re
from pathlib import Path

from evomerge.errors import ConfigError

LOCAL = frozenset(
    (
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
    )
)
"""File systems of one machine, whose locks and shared memory SQLite's write-ahead log may trust."""


# ---- the file system ---------------------------------------------------------------------------------------------------


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Type of the file system that a folder is on, such as 'ext4' or 'nfs4'; None where the machine does not say."""
    place, found, longest = os.path.realpath(folder), None, -1
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:  # id parent major:minor root mount-point options … - type source options
        left, _, right = line.partition(" - ")
        if len(left.split()) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= longest:
            found, longest = right.split()[0], len(point)  # of two on one point the later one is on top
    return found


def journal_mode(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """'WAL' on a local disk, 'DELETE' where files are shared by machines (NFS, Lustre, GPFS, FUSE, …) or of a type not known.

    $EVOMERGE_JOURNAL overrules it; raises ConfigError where that is another word. Machines that name no type: WAL.
    """
    forced = os.environ.get("EVOMERGE_JOURNAL", "").upper()
    if forced:
        if forced not in ("WAL", "DELETE"):
            raise ConfigError(f"$EVOMERGE_JOURNAL must be WAL or DELETE, got '{forced}'; correct or unset it")
        return forced
    kind = file_system(folder, mounts)
    return "WAL" if kind is None or kind in LOCAL else "DELETE"
