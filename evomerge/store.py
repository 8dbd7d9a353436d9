"""One SQLite file per study: the only room that imports sqlite3. Written by the driver alone; anyone may read.

Every acknowledged evaluation is one committed transaction (WAL, synchronous FULL): a killed driver loses none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from evomerge.errors import SetupError, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore, Role
from evomerge.recipe import Recipe

MIGRATIONS = (
    """
    CREATE TABLE study (
        id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, seed INTEGER NOT NULL, config TEXT NOT NULL,
        overrides TEXT NOT NULL, facts TEXT NOT NULL, state TEXT NOT NULL, outcome TEXT, created REAL NOT NULL, finished REAL);
    CREATE TABLE recipes (id TEXT PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE item_sets (id TEXT PRIMARY KEY, body TEXT NOT NULL);
    CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY, recipe TEXT NOT NULL REFERENCES recipes, role TEXT NOT NULL,
        item_set TEXT NOT NULL REFERENCES item_sets, score REAL, error TEXT, metrics TEXT NOT NULL, scores TEXT NOT NULL,
        seconds TEXT NOT NULL, created REAL NOT NULL, UNIQUE (recipe, role, item_set));
    CREATE TABLE trials (
        id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, slot INTEGER NOT NULL, origin TEXT NOT NULL, label TEXT,
        genome TEXT, parents TEXT NOT NULL, recipe TEXT NOT NULL REFERENCES recipes,
        evaluation INTEGER NOT NULL REFERENCES evaluations, UNIQUE (generation, slot));
    CREATE INDEX trials_by_recipe ON trials (recipe);
    """,
    """
    CREATE TABLE sensitivity (
        id INTEGER PRIMARY KEY, centre TEXT NOT NULL REFERENCES recipes, axis TEXT NOT NULL, value REAL NOT NULL,
        recipe TEXT NOT NULL REFERENCES recipes, role TEXT NOT NULL, item_set TEXT NOT NULL REFERENCES item_sets, score REAL, error TEXT,
        metrics TEXT NOT NULL, scores TEXT NOT NULL, seconds TEXT NOT NULL, created REAL NOT NULL, UNIQUE (centre, axis, value, role, item_set));
    """,
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate as it was tried. origin: parent, hand, sampled, injected or mean; label: a hand recipe's name.

    generation 0 holds parents and hand recipes; genome is None where the recipe came from no genome. parents: ids of
    the trials recombined into it. evaluation: row of its search score; score None means it failed, see `error`.
    """

    id: int
    generation: int
    slot: int
    origin: str
    label: str | None
    genome: tuple[float, ...] | None
    parents: tuple[int, ...]
    recipe_id: str
    score: float | None
    error: str | None
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StudyRow:
    """The study as stored. config: the YAML verbatim; overrides: what flags changed in it; facts: hashes, versions
    and choices derived from them; outcome: set when done."""

    name: str
    seed: int
    config: str
    overrides: dict[str, int]
    facts: dict[str, Any]
    state: str
    outcome: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Scored:
    """A stored evaluation of a recipe on a role's items."""

    score: float | None
    evaluation: Evaluation


class Store:
    """An open study file. Use `Store.create` or `Store.open`; a context manager that closes it."""

    def __init__(self, connection: sqlite3.Connection, path: Path, lock: IO[str] | None) -> None:
        self._db, self.path, self._lock = connection, path, lock
        self._db.row_factory = sqlite3.Row

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Opens a study file, creating it if `write`. Raises StudyError if missing, damaged, newer or locked."""
        if not write and not path.is_file():
            raise StudyError(f"there is no study at {path}")
        lock = _lock(path.with_name(path.name + ".lock")) if write else None
        try:
            db = sqlite3.connect(path if write else f"{path.absolute().as_uri()}?mode=ro", uri=not write, isolation_level=None)
            if write:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
            _migrate(db, path, write)
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{path} is not a readable study file: {error}") from None
        return cls(db, path, lock)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets another driver in."""
        self._db.close()
        if self._lock:
            self._lock.close()

    def begin(self, name: str, seed: int, config: str, overrides: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Writes the study's own row; once."""
        row = (name, seed, config, json.dumps(overrides, sort_keys=True), json.dumps(facts, sort_keys=True), time.time())
        self._db.execute("INSERT INTO study VALUES (1, ?, ?, ?, ?, ?, 'running', NULL, ?, NULL)", row)

    def study(self) -> StudyRow | None:
        """The study's own row, None in a file where none has begun."""
        row = self._row("SELECT * FROM study")
        if row is None:
            return None
        outcome = json.loads(row["outcome"]) if row["outcome"] else None
        return StudyRow(row["name"], row["seed"], row["config"], json.loads(row["overrides"]), json.loads(row["facts"]), row["state"], outcome)

    def set_state(self, state: str) -> None:
        """running, paused, failed or done."""
        self._db.execute("UPDATE study SET state = ?", (state,))

    def set_config(self, config: str, overrides: Mapping[str, int]) -> None:
        """Replaces the stored configuration: only its budget may have changed."""
        self._db.execute("UPDATE study SET config = ?, overrides = ?", (config, json.dumps(overrides, sort_keys=True)))

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Marks the study done with its outcome."""
        self._db.execute("UPDATE study SET state = 'done', outcome = ?, finished = ?", (json.dumps(outcome, sort_keys=True), time.time()))

    def add_trial(
        self,
        *,
        generation: int,
        slot: int,
        origin: str,
        label: str | None,
        genome: tuple[float, ...] | None,
        parents: tuple[int, ...],
        recipe: Recipe,
        items: Items,
        evaluation: Evaluation,
        score: float | None,
    ) -> Trial:
        """Stores a trial with its recipe and search evaluation in one transaction."""
        with self._transaction():
            row = self._add_evaluation(recipe, "search", items, evaluation, score)
            values = (generation, slot, origin, label, json.dumps(genome) if genome is not None else None, json.dumps(parents), recipe.id, row)
            cursor = self._db.execute(
                "INSERT INTO trials (generation, slot, origin, label, genome, parents, recipe, evaluation) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values
            )
        assert cursor.lastrowid is not None
        return self.trial(cursor.lastrowid)

    def add_evaluation(self, recipe: Recipe, role: Role, items: Items, evaluation: Evaluation, score: float | None) -> None:
        """Stores an evaluation outside the search (validation, test) in one transaction."""
        with self._transaction():
            self._add_evaluation(recipe, role, items, evaluation, score)

    def evaluation(self, recipe_id: str, role: Role, items: Items) -> Scored | None:
        """The stored evaluation of a recipe on exactly these items, if there is one."""
        row = self._row("SELECT * FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?", (recipe_id, role, item_set_id(items)))
        return None if row is None else self._scored(row)

    def evaluations(self, recipe_id: str) -> list[tuple[Role, Scored]]:
        """All stored evaluations of a recipe, oldest first."""
        rows = self._rows("SELECT * FROM evaluations WHERE recipe = ? ORDER BY id", (recipe_id,))
        return [(row["role"], self._scored(row)) for row in rows]

    def add_sensitivity(
        self, centre: Recipe, axis: str, value: float, recipe: Recipe, role: Role, items: Items, evaluation: Evaluation, score: float | None
    ) -> None:
        """Stores a candidate scored with one coefficient changed, in one transaction. It is no evaluation of the search.

        centre: the candidate; axis, value: the coefficient; recipe: what it was changed to.
        """
        with self._transaction():
            set_id = self._add_items(items)
            for known in (centre, recipe):
                self._db.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (known.id, known.canonical()))
            values = (json.dumps([s.value for s in evaluation.items]), _json(evaluation.seconds), time.time())
            row = (centre.id, axis, value, recipe.id, role, set_id, score, evaluation.error, _json(evaluation.metrics), *values)
            names = "centre, axis, value, recipe, role, item_set, score, error, metrics, scores, seconds, created"
            self._db.execute(f"INSERT INTO sensitivity ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def sensitivity(self, centre_id: str, role: Role, items: Items) -> dict[tuple[str, float], Scored]:
        """(axis, value) -> what is stored of a candidate's neighbours on exactly these items."""
        sql = "SELECT * FROM sensitivity WHERE centre = ? AND role = ? AND item_set = ? ORDER BY id"
        return {(row["axis"], row["value"]): self._scored(row) for row in self._rows(sql, (centre_id, role, item_set_id(items)))}

    def trial(self, trial_id: int) -> Trial:
        """The trial with that id; raises StudyError if there is none."""
        row = self._row(_TRIALS + " WHERE t.id = ?", (trial_id,))
        if row is None:
            raise StudyError(f"{self.path.parent.name} has no candidate {trial_id}; it has 1 to {self.count_trials()}")
        return _trial(row)

    def trial_at(self, generation: int, slot: int) -> Trial | None:
        """The trial of that generation and slot, None if it has not been evaluated."""
        row = self._row(_TRIALS + " WHERE t.generation = ? AND t.slot = ?", (generation, slot))
        return None if row is None else _trial(row)

    def trials(self) -> list[Trial]:
        """All trials by generation and slot."""
        return [_trial(row) for row in self._rows(_TRIALS + " ORDER BY t.generation, t.slot")]

    def count_trials(self) -> int:
        """Number of trials."""
        return int(self._row("SELECT count(*) FROM trials")[0])

    def count_evaluations(self) -> dict[str, int]:
        """Role -> number of stored evaluations; 'failed' -> those with an error."""
        rows = self._rows("SELECT role, count(*), sum(error IS NOT NULL) FROM evaluations GROUP BY role")
        return {row[0]: row[1] for row in rows} | {"failed": sum(row[2] for row in rows)}

    def recipe(self, recipe_id: str) -> Recipe:
        """The stored recipe of that id."""
        row = self._row("SELECT body FROM recipes WHERE id = ?", (recipe_id,))
        if row is None:
            raise StudyError(f"{self.path} holds no recipe {recipe_id}")
        return Recipe.from_json(row["body"])

    def is_driven(self) -> bool:
        """Whether a process holds the study open for writing now."""
        try:
            with self.path.with_name(self.path.name + ".lock").open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def check(self) -> str:
        """'ok', or what SQLite's integrity check found."""
        return str(self._row("PRAGMA integrity_check")[0])

    def _add_evaluation(self, recipe: Recipe, role: Role, items: Items, evaluation: Evaluation, score: float | None) -> int:
        self._db.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe.id, recipe.canonical()))
        set_id = self._add_items(items)
        key = (recipe.id, role, set_id)
        known = self._row("SELECT id FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?", key)
        if known is not None:
            return int(known[0])
        values = [s.value for s in evaluation.items]
        cursor = self._db.execute(
            "INSERT INTO evaluations (recipe, role, item_set, score, error, metrics, scores, seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, score, evaluation.error, _json(evaluation.metrics), json.dumps(values), _json(evaluation.seconds), time.time()),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _add_items(self, items: Items) -> str:
        set_id = item_set_id(items)
        self._db.execute("INSERT OR IGNORE INTO item_sets VALUES (?, ?)", (set_id, _items_json(items)))
        return set_id

    def _scored(self, row: sqlite3.Row) -> Scored:
        body = self._row("SELECT body FROM item_sets WHERE id = ?", (row["item_set"],))[0]
        names = [(task, item) for task, ids in json.loads(body) for item in ids]
        values = json.loads(row["scores"])
        items = tuple(ItemScore(task, item, v) for (task, item), v in zip(names, values, strict=False))
        evaluation = Evaluation(row["recipe"], items, json.loads(row["metrics"]), json.loads(row["seconds"]), row["error"])
        return Scored(row["score"], evaluation)

    def _rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """All rows of a query; raises StudyError where the file is damaged or another program's."""
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{self.path} is damaged or not a study file: {error}") from None

    def _row(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """The first row of a query, None if there is none."""
        rows = self._rows(sql, values)
        return rows[0] if rows else None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # SQLite has rolled back by itself where the disk is full
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise SetupError(f"{self.path} cannot be written: {error}; make room and resume, nothing is lost") from None
            raise


_TRIALS = "SELECT t.*, e.score, e.error, e.metrics, e.seconds FROM trials t JOIN evaluations e ON e.id = t.evaluation"


def item_set_id(items: Items) -> str:
    """16 hexadecimal digits of the SHA-256 of the item ids by task."""
    return hashlib.sha256(_items_json(items).encode()).hexdigest()[:16]


def _items_json(items: Items) -> str:
    return json.dumps([[task, list(ids)] for task, ids in items.items()], separators=(",", ":"))


def _trial(row: sqlite3.Row) -> Trial:
    genome = tuple(json.loads(row["genome"])) if row["genome"] else None
    return Trial(
        id=row["id"],
        generation=row["generation"],
        slot=row["slot"],
        origin=row["origin"],
        label=row["label"],
        genome=genome,
        parents=tuple(json.loads(row["parents"])),
        recipe_id=row["recipe"],
        score=row["score"],
        error=row["error"],
        metrics=json.loads(row["metrics"]),
        seconds=json.loads(row["seconds"]),
    )


def _migrate(db: sqlite3.Connection, path: Path, write: bool) -> None:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StudyError(f"{path} was written by a newer evomerge (schema {version}, this one knows {len(MIGRATIONS)}); upgrade evomerge")
    if version < len(MIGRATIONS) and not write:
        raise StudyError(f"{path} was written by an older evomerge (schema {version}); run or resume it once to bring it up to date")
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")


def _lock(path: Path) -> IO[str]:
    """An exclusive lock for as long as the file is open; the kernel drops it when the process dies."""
    handle = path.open("a+")
    for attempt in range(20):  # a reader that asks who drives holds it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.01 * (attempt < 19))
    else:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise StudyError(f"another process is writing {path.parent.name} ({holder}); stop it first, or choose another study name") from None
    handle.truncate(0)
    handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    handle.flush()
    return handle


def _json(value: Mapping[str, float]) -> str:
    return json.dumps(dict(value), sort_keys=True)
