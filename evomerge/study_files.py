"""Where studies live on disk, who drives them, and what is asked of a driver. Light: imported before anything heavy is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from evomerge.errors import ConfigError, StudyError, suggest

STORE = "study.db"
BACKUP = "study.backup.db"
STOP = "stop"
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
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # of flock: somebody holds it; anything else: it cannot be had here


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that writes a study, or the last one that did. alive: None where that cannot be known from this machine."""

    host: str
    pid: int
    alive: bool | None


def root(given: Path | None = None) -> Path:
    """Folder of the studies: `given`, else $EVOMERGE_ROOT, else results/ in the working directory."""
    return given or Path(os.environ.get("EVOMERGE_ROOT", "results"))


def studies(folder: Path) -> list[str]:
    """Names of the studies in a folder, sorted."""
    return sorted(file.parent.name for file in folder.glob(f"*/{STORE}"))


def store_path(study: str, folder: Path, *, new: bool = False) -> Path:
    """File of a study; raises StudyError for a name that is not one, or unless `new` that is not there."""
    if Path(study).name != study or study in ("", ".", ".."):
        raise StudyError(f"'{study}' is not the name of a study; use letters, digits, '.', '_' and '-'")
    path = folder / study / STORE
    if not new and not path.is_file():
        raise StudyError(f"there is no study '{study}' in {folder}/. {suggest(study, studies(folder))}")
    return path


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


# ---- one driver --------------------------------------------------------------------------------------------------------


def lock_path(store: Path) -> Path:
    """The lock beside a study's file."""
    return store.with_name(store.name + ".lock")


def lock(path: Path, flock: Callable[[int, int], None] = fcntl.flock) -> IO[str]:
    """An exclusive lock for as long as the file is open; the kernel drops it when the process dies. Raises StudyError where it is held.

    Where the file system has no locks (`flock` fails otherwise), a lease beside it names the holder instead; that of a
    dead process of this machine is taken over, one of another machine has to be deleted by hand. Two that find a dead one's at
    the same instant may both take it: it is not as good as a lock.
    """
    handle = path.open("a+")
    for attempt in range(20):  # a reader that asks who drives holds it for a moment
        try:
            flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _BUSY:
                _lease(path, handle)
                break
            time.sleep(0.01 * (attempt < 19))
    else:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise StudyError(f"another process is writing {path.parent.name} ({holder}); stop it first, or choose another study name") from None
    handle.truncate(0)
    handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    handle.flush()
    return handle


def unlock(handle: IO[str]) -> None:
    """Lets another driver in."""
    lease = Path(handle.name + ".lease")
    if _named(lease) == (socket.gethostname(), os.getpid()):
        lease.unlink(missing_ok=True)
    handle.close()


def _lease(path: Path, handle: IO[str]) -> None:
    """Makes the lease file, or raises StudyError where somebody else has it."""
    lease = Path(str(path) + ".lease")
    for _ in range(2):
        with contextlib.suppress(FileExistsError), lease.open("x") as file:  # made by one process alone, on every file system
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
            return
        holder = _named(lease)
        if holder is not None and holder[0] == socket.gethostname() and not _runs(holder[1]):
            lease.unlink(missing_ok=True)
            continue
        break
    handle.close()
    who = f"host {holder[0]}, pid {holder[1]}" if holder else "unknown"
    raise StudyError(f"another process is writing {path.parent.name} ({who}); stop it first. If it is dead, delete {lease}: this disk has no locks")


def driver(store: Path, flock: Callable[[int, int], None] = fcntl.flock) -> Driver | None:
    """Who writes a study now, or did last; None where nobody ever did."""
    path = lock_path(store)
    holder = _named(path)
    alive: bool | None = False
    try:
        with path.open() as handle:
            flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in _BUSY:
            alive = True
        else:
            holder = _named(Path(str(path) + ".lease"))
            alive = None if holder and holder[0] != socket.gethostname() else holder is not None and _runs(holder[1])
    return Driver(*(holder or ("unknown", 0)), alive)


def _named(path: Path) -> tuple[str, int] | None:
    """(host, pid) that a lock or a lease names."""
    try:
        found = re.fullmatch(r"host (.+), pid (\d+)", path.read_text().strip())
    except (OSError, ValueError):
        return None
    return (found[1], int(found[2])) if found else None


def _runs(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---- a request to stop -------------------------------------------------------------------------------------------------


def ask_to_stop(store: Path) -> Driver | None:
    """Asks a study's driver to end, by a file beside the study that it looks for every second, on this machine or another.

    Returns the driver; None, and asks for nothing, where none runs. There is no signal: to the driver that would be a
    preemption, after which a batch system starts it again.
    """
    found = driver(store)
    if found is None or found.alive is False:
        return None
    request = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    beside = store.with_name(f"{STOP}.{os.getpid()}")
    beside.write_text(json.dumps(request))
    beside.replace(store.with_name(STOP))
    return found


def stop_requested(folder: Path) -> bool:
    """Whether `evomerge stop` has asked the driver of the study in that folder to end."""
    return (folder / STOP).exists()


def clear_stop(folder: Path) -> None:
    """Takes the request back: as a driver starts, and as it ends."""
    (folder / STOP).unlink(missing_ok=True)
