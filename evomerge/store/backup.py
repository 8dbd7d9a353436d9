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
    """Copies an open file: written beside, checked, synced and renamed, so that a copy that is there is whole.

    Raises StudyError, and leaves the copy before in its place, where what would be copied is damaged; sqlite3.Error or
    OSError where it cannot be written.
    """
    beside = to.with_name(f"{to.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        copy = sqlite3.connect(beside, isolation_level=None)
        copy.row_factory = sqlite3.Row
        with contextlib.closing(copy):
            db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, whatever the original's journal
            found = integrity.check(copy, store)
        if found != "ok":
            raise damaged(store, found)
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
    """The error for a file that is not what was stored, with the way back to its backup."""
    return StudyError(
        f"{store} is damaged, or not a study file: {' '.join(str(what).split())[:1000]}; {way_back(store)}"
    )


def way_back(store: Path) -> str:
    """How to go back to the backup of a study's file, in a sentence."""
    copy = store.with_name(BACKUP)
    if store.name == BACKUP or not copy.is_file():
        return f"there is no backup beside it ({BACKUP}), bring one back"
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy.stat().st_mtime))
    name = store.name
    way = f"mv {name} {name}.damaged; rm -f {name}-wal {name}-shm {name}-journal {name}.rows; cp {BACKUP} {name}"
    return f"its backup is {copy} of {at}. To go on from there, in {store.parent}: {way}"
