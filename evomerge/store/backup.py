"""A copy of a study's file beside it, made while the search runs, and how to go back to it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import StudyError
from evomerge.store import integrity
from evomerge.store.paths import BACKUP, EARLIER_BACKUP, STORE


@dataclass(frozen=True, slots=True)
class Held:
    """What a study's file, or a copy of one, holds.

    Attributes:
        created: When its study began, in Unix seconds; None where none has begun.
        rows: Rows of the tables that only grow.
    """

    created: float | None
    rows: int

    @classmethod
    def of(cls, db: sqlite3.Connection) -> Held:
        """Reads an open file.

        Args:
            db: Connection to it.

        Returns:
            What it holds.

        Raises:
            sqlite3.Error: It cannot be read.
        """
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        row = db.execute("SELECT created FROM study").fetchone() if "study" in tables else None
        return cls(None if row is None else row[0], integrity.count_rows(db, tables))


def write(db: sqlite3.Connection, store: Path, to: Path) -> None:
    """Copies an open file; the copy is written beside, checked, synced and renamed, so that it is whole.

    The copy before stays too, under another name, see `earlier`.

    Args:
        db: Connection to the file.
        store: The file.
        to: The copy.

    Raises:
        StudyError: What would be copied is damaged, or the copy before is of another study or holds more; the
            copy before stays.
        sqlite3.Error, OSError: The copy cannot be written; the copy before stays.
    """
    refuse_larger(db, store, to)
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
        _keep(to)
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


def refuse_larger(db: sqlite3.Connection, store: Path, copy: Path) -> None:
    """Compares a study's file with its backup, which a file that was begun in its place must not overwrite.

    Args:
        db: Connection to the file.
        store: The file.
        copy: The backup, which may be missing.

    Raises:
        StudyError: The backup is of another study, or holds more rows.
    """
    there = _held(copy)
    if there is None or there.created is None:
        return
    here = Held.of(db)
    if here.created not in (None, there.created):
        difference = f"is not the study that its backup {copy} is of"
    elif here.rows < there.rows:
        difference = f"holds {here.rows} rows, its backup {copy} holds {there.rows}"
    else:
        return
    raise StudyError(
        f"{store} {difference}, and the backup is not overwritten; to go on from it, in {store.parent}: "
        f"{_commands(store, copy)}; to go on without it, move it to another folder"
    )


def earlier(copy: Path) -> Path:
    """Names the copy that was made before a backup.

    Args:
        copy: The backup.

    Returns:
        The file beside it.
    """
    return copy.with_name(EARLIER_BACKUP if copy.name == BACKUP else f"{copy.name}.earlier")


def gone(store: Path) -> StudyError | None:
    """Finds out whether there was a study's file where none is.

    Args:
        store: Where the file would be.

    Returns:
        The error that says what is left of it, with the way back; None where nothing is left, so that a study
        may begin.
    """
    rows = integrity.acknowledged(store)
    left = [f"{rows} rows were stored in it"] if rows else []
    log = store.with_name(f"{store.name}-wal")
    with contextlib.suppress(OSError):
        if log.stat().st_size:
            left.append(f"its log {log.name} is there")
    copies = _copies(store)
    left += [f"its backup {copy.name} is there" for copy in copies]
    if not left:
        return None
    return StudyError(f"{store} is gone, and {', '.join(left)}; {way_back(store)}")


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
    copies = _copies(store)
    if not copies:
        advice = "bring one back" if store.is_file() else "bring it back, or begin anew in another folder"
        return f"there is no backup beside it ({BACKUP}), {advice}"
    copy = copies[0]
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy.stat().st_mtime))
    return f"its backup is {copy} of {made}. To go on from there, in {store.parent}: {_commands(store, copy)}"


def _commands(store: Path, copy: Path) -> str:
    """The commands that put a backup in the place of a file."""
    name = store.name
    beside = f"{name}-wal {name}-shm {name}-journal {name}.rows"
    first = f"mv {name} {name}.damaged; " if store.is_file() else ""
    return f"{first}rm -f {beside}; cp {copy.name} {name}"


def _copies(store: Path) -> list[Path]:
    """The backups of a study's file, the newest first; a file of another name has none."""
    if store.name != STORE:
        return []
    return [copy for name in (BACKUP, EARLIER_BACKUP) if (copy := store.with_name(name)).is_file()]


def _held(copy: Path) -> Held | None:
    """What a copy holds; None where there is none that can be read."""
    if not copy.is_file():  # a pipe would be waited for
        return None
    try:
        with contextlib.closing(_read(copy)) as db:
            return Held.of(db)
    except sqlite3.Error:
        return None


def _read(copy: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    db.row_factory = sqlite3.Row
    return db


def _keep(copy: Path) -> None:
    """Gives a backup a second name before it is replaced, so that two are kept; not where it is damaged."""
    if _held(copy) is None:
        return
    with contextlib.closing(_read(copy)) as db:
        if integrity.check(db, copy) != "ok":
            return
    before = earlier(copy)
    beside = before.with_name(f"{before.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        os.link(copy, beside)
    except OSError:  # a file system without second names
        copy.replace(before)
    else:
        beside.replace(before)
