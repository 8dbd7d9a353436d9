"""Digests of rows, and everything that can be checked of a study's file.

SQLite itself checks how pages are linked, not what is in them: a flipped bit in a score is a score to it.
"""

from __future__ import annotations

import functools
import json
import re
import sqlite3
from collections.abc import Container, Iterator
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.store import paths
from evomerge.store.migrations import MIGRATIONS
from evomerge.store.rows import short_hash
from evomerge.store.score_check import ScoreCheck
from evomerge.store.study_facts import StudyFacts

SEALED = ("study", "evaluations", "trials", "sensitivity", "front", "attempts", "ends", "runs")
_GROWING = ("evaluations", "trials", "sensitivity", "attempts")  # rows are only ever added
_SEALED_SINCE = 6  # schema whose rows have digests
_SHOWN = 5  # findings that are listed
_UNREADABLE = (
    *(sqlite3.DatabaseError, ValueError, TypeError, LookupError, AttributeError, RecursionError),
    *(ArithmeticError, ConfigError),
)
"""Errors of reading damaged rows, such as a text that is a number now."""


def seal(db: sqlite3.Connection, table: str, rowid: int) -> None:
    """Stores a row's digest with it.

    Args:
        db: Connection within a transaction.
        table: The row's table.
        rowid: The row's number.
    """
    row = db.execute(f"SELECT * FROM {table} WHERE rowid = ?", (rowid,)).fetchone()
    db.execute(f"UPDATE {table} SET digest = ? WHERE rowid = ?", (digest(row), rowid))


def seal_all(db: sqlite3.Connection) -> None:
    """Stores the digests of all rows that have none, as the column is added to a file.

    Args:
        db: Connection within a transaction.
    """
    for table in SEALED:
        for row in db.execute(f"SELECT rowid FROM {table} WHERE digest IS NULL").fetchall():
            seal(db, table, row[0])


def digest(row: sqlite3.Row) -> str:
    """Hashes a row's names, values and types; without what is NULL, so that a column can be added later.

    Args:
        row: A whole row.

    Returns:
        16 hexadecimal digits.
    """
    held = {name: row[name] for name in row.keys() if name != "digest" and row[name] is not None}  # noqa: SIM118
    return short_hash(json.dumps(held, sort_keys=True, default=repr))


def intact(row: sqlite3.Row) -> bool:
    """Compares a row with its stored digest.

    Args:
        row: A whole row.

    Returns:
        Whether it is what was stored.
    """
    return bool(row["digest"] == digest(row))


# ---- how many rows were acknowledged ---------------------------------------------------------------------


def count_path(store: Path) -> Path:
    """Names the file beside a study's that says how many rows it holds at least.

    A write-ahead log that is deleted or damaged takes rows with it, and what is left is whole: only a count
    can tell.

    Args:
        store: The study's file.

    Returns:
        The file with the count.
    """
    return store.with_name(store.name + ".rows")


def count_rows(db: sqlite3.Connection, tables: Container[str] = _GROWING) -> int:
    """Counts the rows of the tables that only grow.

    Args:
        db: Connection to the file.
        tables: Those that the file has; an older one has not all.

    Returns:
        Their number.
    """
    counted = [table for table in _GROWING if table in tables]
    return sum(int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in counted)


def count_text(rows: int) -> bytes:
    """Writes a count with its digest, always of one length, so that it is written in place.

    Args:
        rows: The count.

    Returns:
        One line.
    """
    return f"{rows:016d} {short_hash(str(rows))}\n".encode()


def acknowledged(store: Path) -> int:
    """Reads how many rows a study's file held at least.

    Args:
        store: The study's file.

    Returns:
        The count, 0 where it is not known.
    """
    match = re.fullmatch(rb"(\d{16}) ([0-9a-f]{16})\n", paths.first_bytes(count_path(store)))
    if match is None:
        return 0
    rows = int(match[1])
    return rows if count_text(rows) == match[0] else 0


# ---- the check -------------------------------------------------------------------------------------------


def check(db: sqlite3.Connection, store: Path) -> str:
    """Checks pages, references, tables, rows, contents of recipes and items, and whether rows are gone.

    Reads the whole file: about a second for 100 MB.

    Args:
        db: Connection to the file, also while a driver writes it.
        store: The file.

    Returns:
        'ok', or what is damaged.
    """
    least = acknowledged(store)  # read before the rows, which a driver may be adding to
    findings: list[str] = []
    starts_transaction = not db.in_transaction
    try:
        if starts_transaction:
            db.execute("BEGIN")  # one moment of a file that a driver may be writing
        for finding in _findings(db, least):
            findings.append(finding)
            if len(findings) > _SHOWN:
                break
    except _UNREADABLE as error:
        findings.append(f"unreadable: {' '.join(str(error).split())[:200]}")
    finally:
        if starts_transaction and db.in_transaction:
            db.execute("ROLLBACK")
    if len(findings) > _SHOWN:
        findings[_SHOWN:] = ["and more"]
    return "; ".join(findings) or "ok"


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
    current = version >= _SEALED_SINCE
    left = count_rows(db) if current else 0
    if left < least and (current or not version):
        yield (
            f"{least - left} of {least} stored rows are gone (was the log beside it, -wal or -journal, "
            "deleted, or an older file put in its place?)"
        )
    schema = {row["name"]: row["sql"] for row in db.execute("SELECT name, sql FROM sqlite_master")}
    yield from (
        f"table or index {name} is not what it was"
        for name, sql in _schema(version).items()
        if schema.get(name) != sql
    )
    if not version and schema:
        yield "it holds another program's tables"
    yield from strangers(db)
    for table in SEALED if current else ():
        rows = db.execute(f"SELECT * FROM {table}")
        yield from (f"table {table}, row {row[0]} is not what was stored" for row in rows if not intact(row))
    if version:
        yield from _contents(db, version)
    if current:
        yield from _scores(db)


def strangers(db: sqlite3.Connection) -> Iterator[str]:
    """Finds what a study's file does not have: triggers, views, tables and indexes of others.

    They could change what is read or written. Cheap: reads no row of a table.

    Args:
        db: Connection to the file.

    Yields:
        What is there and should not be, or is another thing than it was.
    """
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    known = _schema(min(version, len(MIGRATIONS)))
    for row in db.execute("SELECT type, name, sql FROM sqlite_master").fetchall():
        if row["name"] in known:
            if version and row["type"] != "index" and row["sql"] != known[row["name"]]:
                yield f"{row['type']} {row['name']} is not what it was"
        elif version and row["sql"] is not None:
            yield f"{row['type']} {row['name']} is not one of a study's"


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


def _scores(db: sqlite3.Connection) -> Iterator[str]:
    """What items say of scores."""
    study = db.execute("SELECT facts FROM study").fetchone()
    if study is None:
        return
    check = ScoreCheck(StudyFacts.from_json(json.loads(study[0])))
    items = dict(tuple(row) for row in db.execute("SELECT id, body FROM item_sets"))
    raced = {row[0] for row in db.execute("SELECT evaluation FROM trials WHERE whole IS NOT NULL")}
    for row in db.execute("SELECT * FROM evaluations"):
        found = check.contradiction(row, items[row["item_set"]], predicted=row["id"] in raced)
        if found is not None:
            yield f"table evaluations, row {row['id']}: {found}"
    yield from check.contradictions(db)


@functools.cache
def _schema(version: int) -> dict[str, str | None]:
    """Name -> SQL of the tables and indexes of a schema."""
    db = sqlite3.connect(":memory:")
    for script in MIGRATIONS[:version]:
        db.executescript(script)
    schema = dict(db.execute("SELECT name, sql FROM sqlite_master").fetchall())
    db.close()
    return schema
