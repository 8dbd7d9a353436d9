"""One SQLite file per study: the only room that imports sqlite3. Written by the driver alone; anyone may read.

Every acknowledged evaluation is one committed transaction (WAL, synchronous FULL): a killed driver loses none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from evomerge import study_files
from evomerge.errors import SetupError, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore, Role
from evomerge.recipe import Recipe
from evomerge.schema import MIGRATIONS

Purpose = Role | Literal["rung"]
"""What an evaluation is for: a role of its items, or a rung of a race, whose items are a part of a generation's."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate as it was tried. origin: parent, hand, sampled, injected or mean; label: a hand recipe's name.

    generation 0 holds parents and hand recipes; genome is None where the recipe came from no genome. parents: ids of
    the trials recombined into it. score: the objective as the search sees it, None means it failed, see `error`;
    reported: the objective by the tasks' metrics. whole: how many items its generation was raced on, where it was scored
    on a part of them: `reported` is then of that part, and `score` what the search would have seen on all. dropped: the
    rung, from 1, at which the race dropped it. violation: by how much it breaks the search's `keep`, 0 where it keeps it.
    stage: of the search, from 0; costs: 'layers' and 'parameters' of the model, where they were recorded.
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
    reported: float | None = None
    dropped: int | None = None
    whole: int | None = None
    violation: float = 0.0
    stage: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)


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
    """A stored evaluation of a recipe on some items. score: what ranked it; reported: the objective by the tasks' metrics."""

    score: float | None
    evaluation: Evaluation
    reported: float | None = None


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
        held = study_files.lock(path.with_name(path.name + ".lock")) if write else None
        try:
            db = sqlite3.connect(path if write else f"{path.absolute().as_uri()}?mode=ro", uri=not write, isolation_level=None)
            if write:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
            _migrate(db, path, write)
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{path} is not a readable study file: {error}") from None
        return cls(db, path, held)

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
        reported: float | None = None,
        point: tuple[float, ...] | None = None,
        dropped: int | None = None,
        whole: int | None = None,
        violation: float = 0.0,
        stage: int = 0,
    ) -> Trial:
        """Stores a trial with its recipe and search evaluation in one transaction.

        reported: None where it is the score. point: see `add_evaluation`. dropped, whole, violation, stage: see `Trial`.
        """
        with self._transaction():
            row = self._add_evaluation(recipe, "search", items, evaluation, score, reported, point)
            values = (generation, slot, origin, label, json.dumps(genome) if genome is not None else None, json.dumps(parents), recipe.id, row)
            columns = "generation, slot, origin, label, genome, parents, recipe, evaluation, dropped, whole, violation, stage"
            cursor = self._db.execute(
                f"INSERT INTO trials ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, dropped, whole, violation, stage)
            )
        assert cursor.lastrowid is not None
        return self.trial(cursor.lastrowid)

    def add_evaluation(
        self,
        recipe: Recipe,
        role: Purpose,
        items: Items,
        evaluation: Evaluation,
        score: float | None,
        reported: float | None = None,
        point: tuple[float, ...] | None = None,
    ) -> None:
        """Stores an evaluation that is no trial's (validation, test, a rung) in one transaction.

        point: the tasks' values, higher is better. Of each role and set of items the store keeps the front: the points
        that no other equals or betters in every task and betters in one.
        """
        with self._transaction():
            self._add_evaluation(recipe, role, items, evaluation, score, reported, point)

    def evaluation(self, recipe_id: str, role: Purpose, items: Items) -> Scored | None:
        """The stored evaluation of a recipe on exactly these items, if there is one."""
        row = self._row("SELECT * FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?", (recipe_id, role, item_set_id(items)))
        return None if row is None else self._scored(row)

    def evaluations(self, recipe_id: str) -> list[tuple[Role, Scored]]:
        """All stored evaluations of a recipe, oldest first; the rungs of races are left out."""
        rows = self._rows("SELECT * FROM evaluations WHERE recipe = ? AND role != 'rung' ORDER BY id", (recipe_id,))
        return [(row["role"], self._scored(row)) for row in rows]

    def scored(self, trial: Trial) -> Scored:
        """The evaluation behind a trial's own score."""
        row = self._row("SELECT e.* FROM trials t JOIN evaluations e ON e.id = t.evaluation WHERE t.id = ?", (trial.id,))
        return self._scored(row)

    def front(self, role: Role) -> list[Trial]:
        """The candidates that no other dominates among those scored on the role's newest set of items, the earliest first.

        Candidates are compared with those scored on the same items alone: for the search, those of one generation.
        """
        newest = self._row("SELECT e.item_set FROM front f JOIN evaluations e ON e.id = f.evaluation WHERE e.role = ? ORDER BY e.id DESC", (role,))
        own = "t.evaluation = e.id" if role == "search" else "t.recipe = e.recipe"
        sql = (
            f"SELECT min(t.id) FROM front f JOIN evaluations e ON e.id = f.evaluation JOIN trials t ON {own} "
            "WHERE e.role = ? AND e.item_set = ? GROUP BY e.id ORDER BY min(t.id)"
        )
        return [self.trial(row[0]) for row in self._rows(sql, (role, newest[0]))] if newest else []

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
        """Role -> number of stored evaluations; 'failed' -> those with an error, rungs of races not counted."""
        rows = self._rows("SELECT role, count(*), sum(error IS NOT NULL AND role != 'rung') FROM evaluations GROUP BY role")
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

    def _add_evaluation(
        self,
        recipe: Recipe,
        role: Purpose,
        items: Items,
        evaluation: Evaluation,
        score: float | None,
        reported: float | None,
        point: tuple[float, ...] | None,
    ) -> int:
        recipe_id = recipe.id
        self._db.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe_id, recipe.canonical()))
        set_id = self._add_items(items)
        key = (recipe_id, role, set_id)
        known = self._row("SELECT id FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?", key)
        if known is not None:
            return int(known[0])
        values = [s.value for s in evaluation.items]
        soft = (_column([s.probability for s in evaluation.items]), _column([s.logprob for s in evaluation.items]))
        names = "recipe, role, item_set, score, error, metrics, scores, seconds, created, reported, probabilities, logprobs, costs"
        row = (*key, score, evaluation.error, _json(evaluation.metrics), json.dumps(values), _json(evaluation.seconds), time.time(), reported, *soft)
        cursor = self._db.execute(
            f"INSERT INTO evaluations ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, _json(evaluation.costs))
        )
        assert cursor.lastrowid is not None
        if point is not None and score is not None:
            self._add_to_front(cursor.lastrowid, role, set_id, point)
        return cursor.lastrowid

    def _add_to_front(self, evaluation: int, role: Purpose, set_id: str, point: tuple[float, ...]) -> None:
        sql = "SELECT f.* FROM front f JOIN evaluations e ON e.id = f.evaluation WHERE e.role = ? AND e.item_set = ?"
        held = [(int(row["evaluation"]), tuple(json.loads(row["point"]))) for row in self._rows(sql, (role, set_id))]
        if any(_dominates(other, point) for _, other in held):
            return
        self._db.executemany("DELETE FROM front WHERE evaluation = ?", [(other,) for other, place in held if _dominates(point, place)])
        self._db.execute("INSERT INTO front VALUES (?, ?)", (evaluation, json.dumps(point)))

    def _add_items(self, items: Items) -> str:
        set_id = item_set_id(items)
        self._db.execute("INSERT OR IGNORE INTO item_sets VALUES (?, ?)", (set_id, _items_json(items)))
        return set_id

    def _scored(self, row: sqlite3.Row) -> Scored:
        body = self._row("SELECT body FROM item_sets WHERE id = ?", (row["item_set"],))[0]
        names = [(task, item) for task, ids in json.loads(body) for item in ids]
        values = json.loads(row["scores"])
        stored = row.keys()  # a scan's rows hold no soft scores
        soft = [json.loads(row[n]) if n in stored and row[n] else [None] * len(values) for n in ("probabilities", "logprobs")]
        items = tuple(ItemScore(task, item, *scores) for (task, item), *scores in zip(names, values, *soft, strict=False))
        costs = json.loads(row["costs"]) if "costs" in stored and row["costs"] else {}
        evaluation = Evaluation(row["recipe"], items, json.loads(row["metrics"]), json.loads(row["seconds"]), row["error"], costs)
        reported = row["reported"] if "reported" in stored else None
        return Scored(row["score"], evaluation, row["score"] if reported is None else reported)

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


_TRIALS = "SELECT t.*, e.score, e.reported, e.error, e.metrics, e.seconds, e.costs FROM trials t JOIN evaluations e ON e.id = t.evaluation"


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
        reported=row["score"] if row["reported"] is None else row["reported"],
        dropped=row["dropped"],
        whole=row["whole"],
        violation=row["violation"] or 0.0,
        stage=row["stage"],
        costs=json.loads(row["costs"]) if row["costs"] else {},
    )


def _migrate(db: sqlite3.Connection, path: Path, write: bool) -> None:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StudyError(f"{path} was written by a newer evomerge (schema {version}, this one knows {len(MIGRATIONS)}); upgrade evomerge")
    if version < len(MIGRATIONS) and not write:
        raise StudyError(f"{path} was written by an older evomerge (schema {version}); run or resume it once to bring it up to date")
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _column(values: list[float | None]) -> str | None:
    """A list of soft scores; NULL where no item has one."""
    return json.dumps(values) if any(v is not None for v in values) else None


def _json(value: Mapping[str, float]) -> str:
    return json.dumps(dict(value), sort_keys=True)
