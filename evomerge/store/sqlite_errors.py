"""Which errors SQLite's errors become."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

from evomerge.errors import EvomergeError, NoRoom, SetupError, unwritable
from evomerge.store.backup import damaged

_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_MAY_NOT = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def explained_opening(path: Path, error: BaseException, write: bool) -> EvomergeError | None:
    """Says what to raise for an error of opening a file.

    Args:
        path: The file.
        error: What was raised.
        write: Whether it was opened for writing.

    Returns:
        The error, None where `error` itself is to be raised.
    """
    if isinstance(error, sqlite3.DatabaseError):
        if path.is_file() and not os.access(path, os.R_OK):
            return SetupError(f"{path} may not be read: {error}; get the right to read it")
        if write and code(error) in _MAY_NOT:
            return unwritable(path, OSError(errno.EACCES, str(error)))
        reason = explained(path, error) if write else None
        return reason or damaged(path, error)
    if isinstance(error, UnicodeDecodeError):  # of a table's own text, in SQLite's message
        return damaged(path, error)
    if isinstance(error, OSError):
        return unwritable(path, error)
    return None


def explained(path: Path, error: sqlite3.DatabaseError) -> EvomergeError | None:
    """Says what to raise for an error of SQLite.

    Args:
        path: The file.
        error: What SQLite raised.

    Returns:
        The error, None for one that only a bug of ours can be.
    """
    number = code(error)
    if number in _DAMAGE:
        return damaged(path, error)
    if number in _NO_ROOM:
        return NoRoom(
            f"{path} cannot be written: {error}; nothing is lost: make room, or make it writable, and resume"
        )
    if number == sqlite3.SQLITE_BUSY:
        return SetupError(
            f"{path} is held by another program: {error}; close that one and resume, nothing is lost"
        )
    return None


def code(error: sqlite3.Error) -> int:
    """Reads SQLite's primary result code.

    Args:
        error: What SQLite raised.

    Returns:
        The code, 0 where there is none.
    """
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
