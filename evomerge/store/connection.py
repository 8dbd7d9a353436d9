"""An open study file: its journal, lock and transactions, and which errors SQLite's errors become.

Knows no table by name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sqlite3
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evomerge.errors import StoreLost, StudyError
from evomerge.store import backup, file_systems, integrity, locks, paths, sqlite_errors
from evomerge.store.backup import damaged
from evomerge.store.migrations import MIGRATIONS, READABLE_FROM
from evomerge.store.score_check import ScoreCheck
from evomerge.store.study_facts import StudyFacts

log = logging.getLogger(__name__)
_PATIENCE = 30.0  # seconds that a reader waits for the driver
_LONG_PATIENCE = 600.0  # seconds that the driver waits for readers: a slow one must not end a search
_ENDINGS = ("", "-wal", "-shm", "-journal", ".rows", ".lock", ".lock.lease")
"""What the names of the files of a study end with, its backups left out."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""Errors of rows, and of values in them, that nobody stored."""


class StudyFile:
    """An open study file, as `StudyFile.open` gives it.

    Attributes:
        db: The connection.
        path: The file.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, lock: _Locks | None) -> None:
        """Takes an open connection.

        Args:
            db: The connection.
            path: The file.
            lock: The locks of a process that writes, None for a reader.
        """
        self.db = db
        self.path = path
        self._lock = lock
        self._added = 0  # rows that this transaction has added
        self._rows = 0  # rows that are acknowledged
        self._count = -1  # descriptor of the file with that count
        self._places = (_inode(path), _inode(path.parent))
        self._lost: StoreLost | None = None
        self._score_check: ScoreCheck | None = None
        if lock is not None:
            self._rows = integrity.count_rows(db)
            self._count = os.open(integrity.count_path(path), os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        self.acknowledge()

    @classmethod
    def open(cls, path: Path, write: bool) -> StudyFile:
        """Opens a file, and brings its tables up to date where it is opened for writing.

        Args:
            path: The file.
            write: Open it for writing, and create it where it is missing.

        Returns:
            The open file.

        Raises:
            StudyError: The file is missing, damaged, of a newer version, or another process writes it; or it
                is gone, or holds less than the backup beside it.
            NoRoom: Its disk is full.
            SetupError: It may not be read or written, or another program holds it.
        """
        if not path.is_file():
            if (error := backup.gone(path)) is not None:
                raise error
            if not write:
                raise StudyError(f"there is no study at {path}")
        lock: _Locks | None = None
        db: sqlite3.Connection | None = None
        try:
            if write:
                is_there = path.is_file()
                lock = _Locks.take(path)
                if is_there:
                    _refuse_damaged(path)
                db = _writer(path)
            else:
                db = _reader(path)
            _refuse_strangers(db, path)
            _migrate(db, path, write)
            if write and path.name == paths.STORE:
                backup.refuse_larger(db, path, path.with_name(paths.BACKUP))
            return cls(db, path, lock)
        except BaseException as error:
            if db is not None:
                db.close()
            if lock is not None:
                lock.release()
            explained = sqlite_errors.explained_opening(path, error, write)
            if explained is None:
                raise
            raise explained from None

    def close(self) -> None:
        """Closes the file and releases its locks."""
        self.db.close()
        if self._lock:
            os.close(self._count)
            self._lock.release()
            self._lock = None

    def discard(self, keep: Container[str]) -> None:
        """Closes the file and removes it, with all that belongs to it, before its locks are released.

        Args:
            keep: Names of files that are left where they are.
        """
        self.db.close()
        for ending in _ENDINGS:
            file = self.path.with_name(self.path.name + ending)
            if file.name not in keep:
                file.unlink(missing_ok=True)
        self.close()

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """Runs a query.

        Args:
            sql: The query, with ? for values.
            values: The values.

        Returns:
            All rows.

        Raises:
            StudyError: The file is damaged, or another program's.
        """
        try:
            return self.db.execute(sql, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise damaged(self.path, error) from None

    def row(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """Runs a query for one row.

        Args:
            sql: The query, with ? for values.
            values: The values.

        Returns:
            The first row, None if there is none.

        Raises:
            StudyError: The file is damaged, or another program's.
        """
        rows = self.rows(sql, values)
        return rows[0] if rows else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context in which rows become values.

        Raises:
            StudyError: What was read cannot be understood.
        """
        try:
            yield
        except UNREADABLE as error:
            raise damaged(self.path, f"a row cannot be read: {type(error).__name__}: {error}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Context of which all is stored or nothing, synced at its end.

        Raises:
            NoRoom: The disk is full or read-only; nothing is stored.
            StoreLost: The file is no longer where it was opened; nothing is stored.
            StudyError: The file is open readonly, or damaged.
            SetupError: Another program holds the file.
        """
        if self._lock is None:
            raise StudyError(f"{self.path} is open readonly")
        self._refuse_lost()
        self._added = 0
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:  # SQLite has rolled back by itself where the disk is full
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("ROLLBACK")
            explained = (
                sqlite_errors.explained(self.path, error)
                if isinstance(error, sqlite3.DatabaseError)
                else None
            )
            if explained is None:
                raise
            raise explained from None
        if self._added:
            self._rows += self._added
            self.acknowledge()

    def insert(self, table: str, grows: bool = False, **values: Any) -> int:
        """Adds a row with its digest, within a transaction.

        Args:
            table: Name of the table.
            grows: Count the row, in a table whose rows are only ever added.
            **values: Column -> value.

        Returns:
            Number of the row.
        """
        sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        rowid = self.db.execute(sql, tuple(values.values())).lastrowid
        assert rowid is not None
        integrity.seal(self.db, table, rowid)
        self._added += grows
        return rowid

    def change(self, table: str, rowid: int, **values: Any) -> None:
        """Changes a row and its digest, within a transaction.

        Args:
            table: Name of the table.
            rowid: Number of the row; nothing happens where there is none.
            **values: Column -> new value.
        """
        assignments = ", ".join(f"{name} = ?" for name in values)
        self.db.execute(f"UPDATE {table} SET {assignments} WHERE rowid = ?", (*values.values(), rowid))
        if self.db.execute(f"SELECT 1 FROM {table} WHERE rowid = ?", (rowid,)).fetchone():
            integrity.seal(self.db, table, rowid)

    def score_check(self) -> ScoreCheck | None:
        """What a reader compares scores with; None for a process that writes, which has checked the file."""
        if self._lock is not None:
            return None
        if self._score_check is None:
            row = self.row("SELECT facts FROM study")
            with self.reading():
                facts = StudyFacts() if row is None else StudyFacts.from_json(json.loads(row[0]))
                self._score_check = ScoreCheck(facts)
        return self._score_check

    def _refuse_lost(self) -> None:
        """Raises StoreLost once the path leads to another file, or to none: SQLite would write on unseen."""
        if self._lost is None and _inode(self.path) not in (self._places[0], _UNKNOWN):
            self._lost = StoreLost(self._loss())
        if self._lost is not None:
            raise self._lost

    def _loss(self) -> str:
        """What became of the file, and where its rows are: in a backup that is made now, if it can be."""
        if _inode(self.path.parent) != self._places[1]:
            what = "is gone, its folder was moved or renamed"
            return f"{self.path} {what} while the search ran; go on with the folder where it is now"
        copy = self.path.with_name(paths.BACKUP)
        try:
            backup.write(self.db, self.path, copy)
            saved = f"all that it held is saved in {copy}, and run --resume says how to go on from there"
        except (OSError, sqlite3.Error, StudyError) as error:
            saved = f"what it held could not be saved ({error}); its backup is as it was"
        what = "removed" if _inode(self.path) is None else "replaced by another file"
        return f"{self.path} was {what} while the search ran; {saved}"

    def acknowledge(self, removed: int = 0) -> None:
        """Writes how many rows there are, after they are synced and not synced itself: never too many.

        Args:
            removed: Rows that are about to be removed in the transaction that is open.
        """
        self._rows -= removed
        if self._lock:
            with contextlib.suppress(OSError):  # no room: it says too few, and the check is the weaker
                os.pwrite(self._count, integrity.count_text(self._rows), 0)


@dataclass(frozen=True, slots=True)
class _Locks:
    """The two locks of a driver: of the file, by its descriptor, and of the file beside it, see `locks`."""

    descriptor: int
    handle: IO[str]

    @classmethod
    def take(cls, path: Path) -> _Locks:
        descriptor = locks.lock_file(path)
        try:
            return cls(descriptor, locks.lock(locks.lock_path(path)))
        except BaseException:
            locks.unlock_file(descriptor)
            raise

    def release(self) -> None:
        """To be called when SQLite has closed the file."""
        locks.unlock_file(self.descriptor)
        locks.unlock(self.handle)


_UNKNOWN = (-1, -1)


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to; None where it leads to none, `_UNKNOWN` where the disk does not say."""
    try:
        status = path.stat()
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) else _UNKNOWN
    return status.st_dev, status.st_ino


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=_LONG_PATIENCE if mode == "rwc" else _PATIENCE,
    )
    db.row_factory = sqlite3.Row
    return db


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, but rolls back what a killed driver left in a rollback journal."""
    db = _connect(path, "ro")
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        if sqlite_errors.code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise
    db = _connect(path, "rw")
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        ahead = path.with_name(path.name + "-wal")
        if sqlite_errors.code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or (
            ahead.is_file() and ahead.stat().st_size
        ):
            raise
    # a read-only disk has no place for the memory that readers of a log share; here is no log
    return _connect(path, "ro&immutable=1")


def _refuse_damaged(path: Path) -> None:
    """Raises StudyError for a damaged file before anything is written to it, or to the log beside it."""
    with contextlib.closing(_reader(path)) as db:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        _refuse_newer(version, path)
        finding = integrity.check(db, path)
    if finding != "ok":
        raise damaged(path, finding)


def _refuse_strangers(db: sqlite3.Connection, path: Path) -> None:
    """Raises StudyError for a file with triggers or the like, before it is read or written."""
    finding = next(integrity.strangers(db), None)
    if finding is not None:
        raise damaged(path, finding)


def _writer(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on the disk when they return; its journal suits the file system."""
    db = _connect(path, "rwc")
    try:
        if file_systems.journal_mode(path.parent) == "WAL":
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                if db.execute("PRAGMA user_version").fetchone()[0]:
                    db.execute("ROLLBACK")  # a study that is refused is left as it is, to the byte
                else:
                    db.execute("PRAGMA user_version = 0")  # a write that changes nothing
                    db.execute("COMMIT")
            except sqlite3.OperationalError as error:  # it can fail at the first write only
                log.warning("%s: no write-ahead log here (%s); a rollback journal is kept", path, error)
                db.close()
                db = _connect(path, "rwc")
                _leave_log(db)
        else:
            _leave_log(db)
        # a rollback journal's commit is its removal, and only EXTRA syncs the folder
        wal = db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        db.execute(f"PRAGMA synchronous = {'FULL' if wal else 'EXTRA'}")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


def _leave_log(db: sqlite3.Connection) -> None:
    """A rollback journal; what is in a log is taken over, without the memory that a log's readers share."""
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA locking_mode = NORMAL")
    db.execute("SELECT 1 FROM sqlite_master").fetchone()  # releases the exclusive lock


def _refuse_newer(version: int, path: Path) -> None:
    if version > len(MIGRATIONS):
        raise StudyError(
            f"{path} was written by a newer evomerge (schema {version}, this one knows {len(MIGRATIONS)}); "
            "upgrade evomerge"
        )


def _migrate(db: sqlite3.Connection, path: Path, write: bool) -> None:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    _refuse_newer(version, path)
    if version >= READABLE_FROM and not write:
        return
    if version < len(MIGRATIONS) and not write:
        raise StudyError(
            f"{path} was written by an older evomerge (schema {version}); "
            "run or resume it once to bring it up to date"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number};")
        if number == len(MIGRATIONS):
            integrity.seal_all(db)
        db.execute("COMMIT")
