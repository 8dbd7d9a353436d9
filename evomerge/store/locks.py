"""The lock of a study's driver: one process writes a store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from evomerge.errors import StudyError

_BUSY = (
    errno.EWOULDBLOCK,
    errno.EAGAIN,
    errno.EACCES,
)  # of flock: somebody holds it; anything else: it cannot be had here


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that writes a study, or the last one that did. alive: None where that cannot be known from this machine."""

    host: str
    pid: int
    alive: bool | None


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
        raise StudyError(
            f"another process is writing {path.parent.name} ({holder}); stop it first, or choose another study name"
        ) from None
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
        with (
            contextlib.suppress(FileExistsError),
            lease.open("x") as file,
        ):  # made by one process alone, on every file system
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
            return
        holder = _named(lease)
        if holder is not None and holder[0] == socket.gethostname() and not _runs(holder[1]):
            lease.unlink(missing_ok=True)
            continue
        break
    handle.close()
    who = f"host {holder[0]}, pid {holder[1]}" if holder else "unknown"
    raise StudyError(
        f"another process is writing {path.parent.name} ({who}); stop it first. If it is dead, delete {lease}: this disk has no locks"
    )


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
            alive = (
                None
                if holder and holder[0] != socket.gethostname()
                else holder is not None and _runs(holder[1])
            )
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
