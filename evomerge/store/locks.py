"""The locks of a study's driver: one process writes a store.

Two are held: of a file beside the study's, which names the driver, and of the study's own file, which holds
also where the first was deleted, or where the file has a second name or is a link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from evomerge.errors import StudyError
from evomerge.store import paths

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""Errors of flock where another process holds the lock; any other means that there are no locks here."""
_BYTE = 0x40000000 + 1024  # of the study's file that is locked: beyond those that SQLite locks
_NAMING_SECONDS = 0.5  # in which a driver that has just taken the lock writes its name there
_ATTEMPTS = 20  # a reader that asks who drives holds the lock for a moment


@dataclass(frozen=True, slots=True)
class Driver:
    """The process that writes a study, or the last one that did.

    Attributes:
        host: Its machine.
        pid: Its process id.
        alive: Whether it runs, None where that cannot be known from this machine.
    """

    host: str
    pid: int
    alive: bool | None


def lock_path(store: Path) -> Path:
    """Names the lock of a study.

    Args:
        store: The study's file.

    Returns:
        The file beside it that is locked.
    """
    return store.with_name(store.name + ".lock")


def lock(path: Path, flock: Callable[[int, int], None] = fcntl.flock) -> IO[str]:
    """Takes an exclusive lock for as long as the file is open; the kernel drops it when the process dies.

    Where the file system has no locks (`flock` fails otherwise), a lease beside it names the holder instead;
    that of a dead process of this machine is taken over, one of another machine has to be deleted by hand.
    Two processes that find a dead one's lease at the same instant may both take it: it is not as good as a
    lock.

    Args:
        path: The file to lock, see `lock_path`.
        flock: Takes (file descriptor, operation).

    Returns:
        The open file.

    Raises:
        StudyError: Another process holds the lock.
    """
    handle = path.open("a+")
    for attempt in range(_ATTEMPTS):
        try:
            flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _BUSY:
                _lease(path, handle)
                break
            if attempt < _ATTEMPTS - 1:
                time.sleep(0.01)
    else:
        handle.close()
        raise _busy(path) from None
    handle.truncate(0)
    handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    handle.flush()
    return handle


def unlock(handle: IO[str]) -> None:
    """Releases a lock, so that another process can take it.

    Args:
        handle: What `lock` returned.
    """
    lease = Path(handle.name + ".lease")
    if _named(lease) == (socket.gethostname(), os.getpid()):
        lease.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # by closing alone, what a child has inherited would keep it
        fcntl.flock(handle.fileno(), fcntl.LOCK_UN)
    handle.close()


def lock_file(store: Path) -> int:
    """Opens a study's file, creates it where it is missing, and locks the file itself, by whatever name.

    SQLite's own locks are of other bytes. The descriptor has to stay open until SQLite has closed the file:
    the system drops all locks of a process on a file with the first descriptor that it closes.

    Args:
        store: The study's file.

    Returns:
        The descriptor.

    Raises:
        StudyError: Another process holds the lock.
    """
    descriptor = os.open(store, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock_byte(descriptor, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in _BUSY:
            os.close(descriptor)
            raise _busy(lock_path(store)) from None
    return descriptor  # where there are no locks the lease alone holds


def unlock_file(descriptor: int) -> None:
    """Releases the lock of a study's file.

    Args:
        descriptor: What `lock_file` returned.
    """
    with contextlib.suppress(OSError):
        _lock_byte(descriptor, fcntl.F_UNLCK)
    os.close(descriptor)


def _lock_byte(descriptor: int, kind: int) -> None:
    """A lock of a byte that belongs to the open file, not to the process; none where the system has none."""
    command = getattr(fcntl, "F_OFD_SETLK", None)
    if command is not None:
        fcntl.fcntl(descriptor, command, struct.pack("@hhlli4x", kind, os.SEEK_SET, _BYTE, 1, 0))


def _busy(path: Path) -> StudyError:
    """The error of a lock that another process holds, which the lock's text names."""
    named = _named(path)
    until = time.monotonic() + _NAMING_SECONDS
    while not named and time.monotonic() < until:  # its holder writes the name after it has the lock
        time.sleep(0.02)
        named = _named(path)
    holder = f"host {named[0]}, pid {named[1]}" if named else f"unknown: {path.name} does not name it"
    return StudyError(
        f"another process is writing {path.parent.name} ({holder}); "
        "stop it first, or choose another study name"
    )


def _lease(path: Path, handle: IO[str]) -> None:
    """Makes the lease file, or raises StudyError where somebody else has it."""
    lease = Path(str(path) + ".lease")
    for _ in range(2):
        # on every file system one process alone makes a file that was not there
        with contextlib.suppress(FileExistsError), lease.open("x") as file:
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
        f"another process is writing {path.parent.name} ({who}); stop it first. "
        f"If it is dead, delete {lease}: this disk has no locks"
    )


def driver(store: Path, flock: Callable[[int, int], None] = fcntl.flock) -> Driver | None:
    """Finds who writes a study now, or did last.

    Args:
        store: The study's file.
        flock: Takes (file descriptor, operation).

    Returns:
        The process, None where nobody ever wrote the study.
    """
    path = lock_path(store)
    holder = _named(path)
    alive: bool | None = False
    if path.exists() and not path.is_file():
        return None
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
            if holder is None:
                alive = False
            elif holder[0] != socket.gethostname():
                alive = None
            else:
                alive = _runs(holder[1])
    return Driver(*(holder or ("unknown", 0)), alive)


def _named(path: Path) -> tuple[str, int] | None:
    """(host, pid) that a lock or a lease names."""
    text = paths.first_bytes(path).decode(errors="replace")
    match = re.fullmatch(r"host (.+), pid (\d{1,9})", text.strip())
    return (match[1], int(match[2])) if match else None


def _runs(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
