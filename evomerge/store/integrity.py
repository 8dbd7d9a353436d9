"""Digests of rows, and everything that can be checked of a study's file. SQLite itself checks how pages hang together, not what
is in them: a flipped bit in a score is a score to it."""

from __future__ import annotations

import functools
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from evomerge.store.migrations import MIGRATIONS
from evomerge.store.rows import short_hash

SEALED = ("study", "evaluations", "trials", "sensitivity", "front", "attempts", "ends", "runs")
_GROWING = ("evaluations", "trials", "sensitivity", "attempts")  # rows are only ever added
_SHOWN = 5  # findings that are listed


def seal(db: sqlite3.Connection, table: str, rowid: int) -> None:
    """Stores a row's digest with it."""
    row = db.execute(f"SELECT * FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    db.execute(f"UPDATE {table} SET digest = ? WHERE rowid = ?", (digest(row), rowid))


def seal_all(db: sqlite3.Connection) -> None:
    """Seals the rows of a file that has just been given the column."""
    for table in SEALED:
        for row in db.execute(f"SELECT rowid FROM {table} WHERE digest IS NULL").fetchall():
            seal(db, table, row[0])


def digest(row: sqlite3.Row) -> str:
    """16 hexadecimal digits of a whole row's names, values and types; without what is NULL, so that a column can be added."""
    held = {name: row[name] for name in row.keys() if name != "digest" and row[name] is not None}  # noqa: SIM118
    return short_hash(json.dumps(held, sort_keys=True, default=repr))


def intact(row: sqlite3.Row) -> bool:
    """Whether a whole row is what was stored."""
    return bool(row["digest"] == digest(row))


# ---- how many rows were acknowledged -----------------------------------------------------------------------------------


def count_path(store: Path) -> Path:
    """Beside a study's file: how many rows it holds at least. A log file that is deleted or damaged takes rows with it, and
    what is left is whole."""
    return store.with_name(store.name + ".rows")


def count_rows(db: sqlite3.Connection) -> int:
    """Rows of the tables that only grow."""
    return sum(int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in _GROWING)


def count_text(rows: int) -> bytes:
    """A count as it is written, of one length, so that it is written in place."""
    return f"{rows:016d} {short_hash(str(rows))}\n".encode()


def acknowledged(store: Path) -> int:
    """How many rows a study's file held at least; 0 where that is not known."""
    try:
        found = re.fullmatch(rb"(\d{16}) ([0-9a-f]{16})\n", count_path(store).read_bytes())
    except OSError:
        return 0
    rows = int(found[1]) if found else 0
    return rows if found and count_text(rows) == found[0] else 0


# ---- the check ---------------------------------------------------------------------------------------------------------


def check(db: sqlite3.Connection, store: Path) -> str:
    """'ok', or what is damaged: pages, references, tables, rows, contents of recipes and items, rows that are gone.

    Reads the whole file: about a second for 100 MB.
    """
    least = acknowledged(store)  # read before the rows, which a driver may be adding to
    found: list[str] = []
    own = not db.in_transaction
    try:
        if own:
            db.execute("BEGIN")  # one moment of a file that a driver may be writing
        for finding in _findings(db, least):
            found.append(finding)
            if len(found) > _SHOWN:
                break
    except (
        sqlite3.DatabaseError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # a text that is a number now
        found.append(f"unreadable: {' '.join(str(error).split())[:200]}")
    finally:
        if own and db.in_transaction:
            db.execute("ROLLBACK")
    return "; ".join(found[:_SHOWN] + ["and more"] * (len(found) > _SHOWN)) or "ok"


def _findings(db: sqlite3.Connection, least: int) -> Iterator[str]:
    yield from (
        " ".join(str(row[0]).split())[:200]
        for row in db.execute("PRAGMA integrity_check(10)")
        if row[0] != "ok"
    )
    yield from (
        f"table {row[0]}, row {row[1]} refers to nothing in {row[2]}"
        for row in db.execute("PRAGMA foreign_key_check")
    )
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    current = version == len(MIGRATIONS)
    if (left := count_rows(db) if current else 0) < least and (current or not version):
        yield f"{least - left} of {least} stored rows are gone (was the log beside it, -wal or -journal, deleted, or an older file put in its place?)"
    there = {row["name"]: row["sql"] for row in db.execute("SELECT name, sql FROM sqlite_master")}
    yield from (
        f"table or index {name} is not what it was"
        for name, sql in _schema(version).items()
        if there.get(name) != sql
    )
    if not version and there:
        yield "it holds another program's tables"
    for table in SEALED if current else ():
        rows = db.execute(f"SELECT * FROM {table}")
        yield from (f"table {table}, row {row[0]} is not what was stored" for row in rows if not intact(row))
    if version:
        yield from _contents(db, version)


def _contents(db: sqlite3.Connection, version: int) -> Iterator[str]:
    """What hashes and counts say of recipes, items and scores."""
    sizes: dict[str, int] = {}
    for row in db.execute("SELECT id, body FROM item_sets"):
        if short_hash(row["body"]) != row["id"]:
            yield f"item set {row['id']} is not what was stored"
        sizes[row["id"]] = sum(len(ids) for _, ids in json.loads(row["body"]))
    for row in db.execute("SELECT id, body FROM recipes"):
        if short_hash(row["body"]) != row["id"]:
            yield f"recipe {row['id']} is not what was stored"
    for table in ("evaluations", "sensitivity")[: 1 + (version > 1)]:
        for row in db.execute(f"SELECT id, item_set, error, scores FROM {table}"):
            scores = len(json.loads(row["scores"]))
            items = sizes.get(row["item_set"], -1)
            if scores > items or (scores < items and row["error"] is None):
                yield f"table {table}, row {row['id']} has {scores} scores of {items} items"


@functools.cache
def _schema(version: int) -> dict[str, str | None]:
    """Name -> SQL of the tables and indexes of a schema."""
    db = sqlite3.connect(":memory:")
    for script in MIGRATIONS[:version]:
        db.executescript(script)
    found = dict(db.execute("SELECT name, sql FROM sqlite_master").fetchall())
    db.close()
    return found
