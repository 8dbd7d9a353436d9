"""A copy of a study's file beside it, made while the search runs, and how to go back to it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from evomerge.errors import StudyError
from evomerge.store import integrity
from evomerge.store.paths import BACKUP


def write(db: sqlite3.Connection, store: Path, to: Path) -> None:
    """Copies an open file; the copy is written beside, checked, synced and renamed, so that it is whole.

    Args:
        db: Connection to the file.
        store: The file.
        to: The copy.

    Raises:
        StudyError: What would be copied is damaged; the copy before stays.
        sqlite3.Error, OSError: The copy cannot be written; the copy before stays.
    """
    beside = to.with_name(f"{to.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        copy = sqlite3.connect(beside, isolation_level=None)
        copy.row_factory = sqlite3.Row
        with contextlib.closing(copy):
            db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, whatever the original's journal
            finding = integrity.check(copy, store)
        if finding != "ok":
            raise damaged(store, finding)
        with beside.open("rb") as handle:
            os.fsync(handle.fileno())
        beside.replace(to)
        folder = os.open(to.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        for rest in (beside, Path(f"{beside}-journal"), Path(f"{beside}-wal")):
            with contextlib.suppress(OSError):
                rest.unlink(missing_ok=True)


def damaged(store: Path, what: object) -> StudyError:
    """Makes the error for a file that is not what was stored.

    Args:
        store: The file.
        what: What was found, of which 1,000 characters are shown.

    Returns:
        The error, with the way back to the backup.
    """
    finding = " ".join(str(what).split())[:1000]
    return StudyError(f"{store} is damaged, or not a study file: {finding}; {way_back(store)}")


def way_back(store: Path) -> str:
    """Says how to go back to the backup of a study's file.

    Args:
        store: The file.

    Returns:
        A sentence with the commands, or that there is no backup.
    """
    copy = store.with_name(BACKUP)
    if store.name == BACKUP or not copy.is_file():
        return f"there is no backup beside it ({BACKUP}), bring one back"
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy.stat().st_mtime))
    name = store.name
    beside = f"{name}-wal {name}-shm {name}-journal {name}.rows"
    commands = f"mv {name} {name}.damaged; rm -f {beside}; cp {BACKUP} {name}"
    return f"its backup is {copy} of {made}. To go on from there, in {store.parent}: {commands}"
