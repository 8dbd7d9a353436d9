"""A study's file, open: its journal, its lock, its transactions, and what becomes of SQLite's errors. Knows no table by name."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from evomerge.errors import EvomergeError, NoRoom, SetupError, StudyError
from evomerge.store import file_systems, integrity, locks
from evomerge.store.backup import damaged
from evomerge.store.migrations import MIGRATIONS

log = logging.getLogger(__name__)
_PATIENCE = 30.0  # seconds that a reader waits for the driver
_LONG_PATIENCE = 600.0  # seconds that the driver waits for readers: a slow one must not end a search
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StudyFile:
    """An open connection. lock: held by the one that writes, None for a reader."""

    def __init__(self, db: sqlite3.Connection, path: Path, lock: IO[str] | None) -> None:
        self.db, self.path, self._lock = db, path, lock
        self._rows, self._added = (integrity.count_rows(db) if lock else 0), 0
        self._count = os.open(integrity.count_path(path), os.O_WRONLY | os.O_CREAT, 0o644) if lock else -1
        self._acknowledge()

    @classmethod
    def open(cls, path: Path, write: bool) -> StudyFile:
        """Raises StudyError if the file is missing, damaged, newer or locked; NoRoom if it cannot be written."""
        if not write and not path.is_file():
            raise StudyError(f"there is no study at {path}")
        held: IO[str] | None = None
        db: sqlite3.Connection | None = None
        try:
            held = locks.lock(locks.lock_path(path)) if write else None
            if held is None:
                db = _reader(path)
            else:
                if path.is_file():
                    _refuse_damaged(path)
                db = _writer(path)
            _migrate(db, path, write)
            return cls(db, path, held)
        except BaseException as error:
            if db is not None:
                db.close()
            if held is not None:
                locks.unlock(held)
            if isinstance(error, sqlite3.DatabaseError):
                raise (_explained(path, error) if write else None) or damaged(path, error) from None
            if isinstance(error, UnicodeDecodeError):  # of a table's own text, in SQLite's message
                raise damaged(path, error) from None
            if isinstance(error, OSError) and error.errno in _ERRNO:
                raise NoRoom(
                    f"{path} cannot be written: {error.strerror}; make room, or make it writable, and start again"
                ) from None
            raise

    def close(self) -> None:
        """Closes the file and lets another driver in."""
        self.db.close()
        if self._lock:
            os.close(self._count)
            locks.unlock(self._lock)
            self._lock = None

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """All rows of a query; raises StudyError where the file is damaged or another program's."""
        try:
            return self.db.execute(sql, values).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise damaged(self.path, error) from None

    def row(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """The first row of a query, None if there is none."""
        rows = self.rows(sql, values)
        return rows[0] if rows else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises StudyError where what was read cannot be understood."""
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise damaged(self.path, f"a row cannot be read: {type(error).__name__}: {error}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, synced at its end. Raises NoRoom where the disk is full or read-only: nothing of it is stored then."""
        if self._lock is None:
            raise StudyError(f"{self.path} is open readonly")
        self._added = 0
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:  # SQLite has rolled back by itself where the disk is full
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError) and (known := _explained(self.path, error)):
                raise known from None
            raise
        if self._added:
            self._rows += self._added
            self._acknowledge()

    def insert(self, table: str, grows: bool = False, **values: Any) -> int:
        """Adds a row with its digest, within a transaction, and returns its number. grows: the table's rows are counted."""
        sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        rowid = self.db.execute(sql, tuple(values.values())).lastrowid
        assert rowid is not None
        integrity.seal(self.db, table, rowid)
        self._added += grows
        return rowid

    def change(self, table: str, rowid: int, **values: Any) -> None:
        """Changes a row, and its digest, within a transaction."""
        self.db.execute(
            f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in values)} WHERE rowid = ?",
            (*values.values(), rowid),
        )
        if self.db.execute(f"SELECT 1 FROM {table} WHERE rowid = ?", (rowid,)).fetchone():
            integrity.seal(self.db, table, rowid)

    def _acknowledge(self) -> None:
        """Writes how many rows there are: after they are synced and not synced itself, so that it never says too many."""
        if self._lock:
            with contextlib.suppress(OSError):  # no room: it says too few, and the check is the weaker
                os.pwrite(self._count, integrity.count_text(self._rows), 0)


def _explained(path: Path, error: sqlite3.DatabaseError) -> EvomergeError | None:
    """What to raise for an error of SQLite; None for one that only a bug of ours can be."""
    code = _code(error)
    if code in _DAMAGE:
        return damaged(path, error)
    if code in _NO_ROOM:
        return NoRoom(
            f"{path} cannot be written: {error}; nothing is lost: make room, or make it writable, and resume"
        )
    if code == sqlite3.SQLITE_BUSY:
        return SetupError(
            f"{path} is held by another program: {error}; close that one and resume, nothing is lost"
        )
    return None


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


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
    """A connection that writes nothing, but for rolling back what a killed driver left half done where the journal is no log."""
    db = _connect(path, "ro")
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise
    db = _connect(path, "rw")
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        ahead = path.with_name(path.name + "-wal")
        if _code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or (
            ahead.is_file() and ahead.stat().st_size
        ):
            raise
    return _connect(
        path, "ro&immutable=1"
    )  # a read-only disk has no place for what readers of a log share; here is no log


def _refuse_damaged(path: Path) -> None:
    """Raises StudyError for a damaged file before anything is written to it, or to the log beside it."""
    with contextlib.closing(_reader(path)) as db:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        _refuse_newer(version, path)
        found = integrity.check(db, path)
    if found != "ok":
        raise damaged(path, found)


def _writer(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on the disk when they return, with the journal that the file system can keep."""
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
    db.execute("SELECT 1 FROM sqlite_master").fetchone()  # lets go of the exclusive lock


def _refuse_newer(version: int, path: Path) -> None:
    if version > len(MIGRATIONS):
        raise StudyError(
            f"{path} was written by a newer evomerge (schema {version}, this one knows {len(MIGRATIONS)}); upgrade evomerge"
        )


def _migrate(db: sqlite3.Connection, path: Path, write: bool) -> None:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    _refuse_newer(version, path)
    if version < len(MIGRATIONS) and not write:
        raise StudyError(
            f"{path} was written by an older evomerge (schema {version}); run or resume it once to bring it up to date"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number};")
        if number == len(MIGRATIONS):
            integrity.seal_all(db)
        db.execute("COMMIT")
