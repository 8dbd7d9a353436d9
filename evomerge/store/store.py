"""The store of a study: what the search writes and everything that is asked of it, by name."""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation import Attempt, Evaluation, Items, Role
from evomerge.recipes import Recipe
from evomerge.store import backup, integrity, locks, paths, rows
from evomerge.store.connection import File
from evomerge.store.rows import Purpose, Run, Scored, StudyRow, Trial, WorkerUse, item_set_id
from evomerge.store.study_facts import Outcome, StudyFacts

log = logging.getLogger(__name__)


class Store:
    """An open study file. Use `Store.create` or `Store.open`; a context manager that closes it."""

    def __init__(self, file: File) -> None:
        self._file, self.path = file, file.path
        self._backed_up, self._changed = time.monotonic(), False  # when; whether there is something new since
        self._busy: float | None = None  # sum of the attempts' seconds, where it has been asked for
        self._run: int | None = None  # row of this process

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Opens a study file, creating it if `write`. Raises StudyError if missing, damaged, newer or locked, NoRoom if it cannot be written.

        To write, the whole file is checked first: a search does not go on from what was not stored.
        """
        return cls(File.open(path, write))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets another driver in."""
        self._file.close()

    def begin(
        self, name: str, seed: int, config: str, overrides: Mapping[str, int], facts: StudyFacts
    ) -> None:
        """Writes the study's own row; once."""
        with self._file.transaction():
            self._file.insert(
                "study", id=1, name=name, seed=seed, config=config, overrides=json.dumps(overrides, sort_keys=True),
                facts=json.dumps(facts.to_json(), sort_keys=True), state="running", created=time.time(),
            )  # fmt: skip

    def study(self) -> StudyRow | None:
        """The study's own row, None in a file where none has begun."""
        row = self._file.row("SELECT * FROM study")
        with self._file.reading():
            return None if row is None else rows.study(row)

    def set_state(self, state: str) -> None:
        """running, paused, failed or done."""
        self._set(state=state)

    def set_config(self, config: str, overrides: Mapping[str, int]) -> None:
        """Replaces the stored configuration: only its budget may have changed."""
        self._set(config=config, overrides=json.dumps(overrides, sort_keys=True))

    def finish(self, outcome: Outcome) -> None:
        """Marks the study done with its outcome."""
        self._set(state="done", outcome=json.dumps(outcome.to_json(), sort_keys=True), finished=time.time())

    def _set(self, **values: Any) -> None:
        with self._file.transaction():
            self._file.change("study", 1, **values)

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
        island: int = 0,
        trial_id: int | None = None,
    ) -> Trial:
        """Stores a trial with its recipe and search evaluation in one transaction.

        reported: None where it is the score. point: see `add_evaluation`. dropped, whole, violation, stage, island: see `Trial`.
        trial_id: None takes the next number, and so does one that is taken.
        """
        with self._writing():
            evaluated = self._add_evaluation(recipe, "search", items, evaluation, score, reported, point)
            body = json.dumps(genome) if genome is not None else None
            if trial_id is not None and self._file.row("SELECT 1 FROM trials WHERE id = ?", (trial_id,)):
                trial_id = None
            rowid = self._file.insert(
                "trials", grows=True, id=trial_id, generation=generation, slot=slot, origin=origin, label=label, genome=body,
                parents=json.dumps(parents), recipe=recipe.id, evaluation=evaluated, dropped=dropped, whole=whole, violation=violation,
                stage=stage, island=island,
            )  # fmt: skip
        return self.trial(rowid)

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
        with self._writing():
            self._add_evaluation(recipe, role, items, evaluation, score, reported, point)

    def evaluation(self, recipe_id: str, role: Purpose, items: Items) -> Scored | None:
        """The stored evaluation of a recipe on exactly these items, if there is one."""
        row = self._file.row(
            "SELECT * FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?",
            (recipe_id, role, item_set_id(items)),
        )
        return None if row is None else self._scored(row)

    def evaluations(self, recipe_id: str) -> list[tuple[Role, Scored]]:
        """All stored evaluations of a recipe, oldest first; the rungs of races are left out."""
        found = self._file.rows(
            "SELECT * FROM evaluations WHERE recipe = ? AND role != 'rung' ORDER BY id", (recipe_id,)
        )
        return [(row["role"], self._scored(row)) for row in found]

    def scored(self, trial: Trial) -> Scored:
        """The evaluation behind a trial's own score."""
        row = self._file.row(
            "SELECT e.* FROM trials t JOIN evaluations e ON e.id = t.evaluation WHERE t.id = ?", (trial.id,)
        )
        return self._scored(row)

    def front(self, role: Role) -> list[Trial]:
        """The candidates that no other dominates among those scored on the role's newest set of items, the earliest first.

        Candidates are compared with those scored on the same items alone: for the search, those of one generation.
        """
        newest = self._file.row(
            "SELECT e.item_set FROM front f JOIN evaluations e ON e.id = f.evaluation WHERE e.role = ? ORDER BY e.id DESC",
            (role,),
        )
        own = "t.evaluation = e.id" if role == "search" else "t.recipe = e.recipe"
        sql = (
            f"SELECT min(t.id) FROM front f JOIN evaluations e ON e.id = f.evaluation JOIN trials t ON {own} "
            "WHERE e.role = ? AND e.item_set = ? GROUP BY e.id ORDER BY min(t.id)"
        )
        return [self.trial(row[0]) for row in self._file.rows(sql, (role, newest[0]))] if newest else []

    def add_sensitivity(
        self,
        centre: Recipe,
        axis: str,
        value: float,
        recipe: Recipe,
        role: Role,
        items: Items,
        evaluation: Evaluation,
        score: float | None,
    ) -> None:
        """Stores a candidate scored with one coefficient changed, in one transaction. It is no evaluation of the search.

        centre: the candidate; axis, value: the coefficient; recipe: what it was changed to.
        """
        with self._writing():
            set_id = self._add_items(items)
            for known in (centre, recipe):
                self._file.db.execute(
                    "INSERT OR IGNORE INTO recipes VALUES (?, ?)", (known.id, known.canonical())
                )
            self._file.insert(
                "sensitivity", grows=True, centre=centre.id, axis=axis, value=value, recipe=recipe.id, role=role, item_set=set_id, score=score,
                error=evaluation.error, metrics=rows.numbers(evaluation.metrics), scores=json.dumps([s.value for s in evaluation.items]),
                seconds=rows.numbers(evaluation.seconds), created=time.time(),
            )  # fmt: skip

    def sensitivity(self, centre_id: str, role: Role, items: Items) -> dict[tuple[str, float], Scored]:
        """(axis, value) -> what is stored of a candidate's neighbours on exactly these items."""
        sql = "SELECT * FROM sensitivity WHERE centre = ? AND role = ? AND item_set = ? ORDER BY id"
        return {
            (row["axis"], row["value"]): self._scored(row)
            for row in self._file.rows(sql, (centre_id, role, item_set_id(items)))
        }

    def trial(self, trial_id: int) -> Trial:
        """The trial with that id; raises StudyError if there is none."""
        row = self._file.row(rows.TRIALS + " WHERE t.id = ?", (trial_id,))
        if row is None:
            raise StudyError(
                f"{self.path.parent.name} has no candidate {trial_id}; it has 1 to {self.count_trials()}"
            )
        with self._file.reading():
            return rows.trial(row)

    def trial_at(self, generation: int, slot: int) -> Trial | None:
        """The trial of that generation and slot, None if it has not been evaluated."""
        row = self._file.row(rows.TRIALS + " WHERE t.generation = ? AND t.slot = ?", (generation, slot))
        with self._file.reading():
            return None if row is None else rows.trial(row)

    def trials(self) -> list[Trial]:
        """All trials by generation and slot."""
        with self._file.reading():
            return [
                rows.trial(row) for row in self._file.rows(rows.TRIALS + " ORDER BY t.generation, t.slot")
            ]

    def last_trial_before(self, generation: int) -> int:
        """The highest id of trials of earlier generations, 0 if there are none."""
        return int(
            self._file.row("SELECT coalesce(max(id), 0) FROM trials WHERE generation < ?", (generation,))[0]
        )

    def count_trials(self) -> int:
        """Number of trials."""
        return int(self._file.row("SELECT count(*) FROM trials")[0])

    def count_evaluations(self) -> dict[str, int]:
        """Role -> number of stored evaluations; 'failed' -> those with an error, rungs of races not counted."""
        found = self._file.rows(
            "SELECT role, count(*), sum(error IS NOT NULL AND role != 'rung') FROM evaluations GROUP BY role"
        )
        return {row[0]: row[1] for row in found} | {"failed": sum(row[2] for row in found)}

    def recipe(self, recipe_id: str) -> Recipe:
        """The stored recipe of that id."""
        row = self._file.row("SELECT body FROM recipes WHERE id = ?", (recipe_id,))
        if row is None:
            raise StudyError(f"{self.path} holds no recipe {recipe_id}")
        recipe = Recipe.from_json(row["body"])
        if recipe.id != recipe_id:
            raise backup.damaged(self.path, f"recipe {recipe_id} is another, {recipe.id}")
        return recipe

    def is_driven(self) -> bool:
        """Whether a process holds the study open for writing now."""
        found = locks.driver(self.path)
        return found is not None and found.alive is not False

    def check(self) -> str:
        """'ok', or what is damaged: see `evomerge.store.integrity.check`. Reads the whole file."""
        return integrity.check(self._file.db, self.path)

    def way_back(self) -> str:
        """How to go back to the backup, in a sentence; for a store whose check is not 'ok'."""
        return backup.way_back(self.path)

    def backup(self, to: Path | None = None) -> Path:
        """Copies the store while it is open, to study.backup.db beside it unless told where; the file there is always a whole one.

        Raises StudyError, and keeps the copy before, where the store is damaged; OSError or sqlite3.Error without room.
        """
        to = to or self.path.with_name(paths.BACKUP)
        backup.write(self._file.db, self.path, to)
        return to

    def backup_every(self, minutes: float) -> Path | None:
        """Backs up if something was stored since and that much time has passed since the last one, or since the store was opened.

        Cheap to ask between results. A copy that cannot be written is a warning: the search goes on. Raises StudyError as `backup`.
        """
        if not self._changed or time.monotonic() - self._backed_up < 60 * minutes:
            return None
        self._backed_up, self._changed = time.monotonic(), False
        try:
            return self.backup()
        except (OSError, sqlite3.Error) as error:
            log.warning("%s could not be backed up: %s", self.path, error)
            return None

    def add_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Stores attempts in one transaction."""
        with self._file.transaction():
            for a in attempts:
                self._file.insert(
                    "attempts", grows=True, recipe=a.recipe_id, number=a.number, cause=a.cause, error=a.error, worker=a.worker, host=a.host,
                    pid=a.pid, device=a.device, started=a.started, seconds=a.seconds, log=a.log,
                )  # fmt: skip
        if self._busy is not None:
            self._busy += sum(a.seconds for a in attempts)

    def attempts(self) -> list[Attempt]:
        """All of them, in the order they were stored."""
        with self._file.reading():
            return [rows.attempt(row) for row in self._file.rows("SELECT * FROM attempts ORDER BY id")]

    def failures(self) -> list[tuple[str, int, str]]:
        """(cause, how many attempts, error of the last) of those that were not done, the most frequent first."""
        sql = "SELECT cause, count(*), error, max(id) FROM attempts WHERE cause != 'done' GROUP BY cause ORDER BY count(*) DESC, cause"
        return [(row[0], int(row[1]), row[2] or "") for row in self._file.rows(sql)]

    def workers(self) -> list[WorkerUse]:
        """What each worker did, by name."""
        sql = (
            "SELECT worker, host, device, pid, cause, count(*) AS count, sum(seconds) AS seconds, min(started) AS first, "
            "max(started + seconds) AS last FROM attempts GROUP BY worker, host, device, pid, cause"
        )
        return rows.uses(self._file.rows(sql))

    def busy_seconds(self) -> float:
        """Seconds that workers were at work, of all attempts."""
        if self._busy is None:
            self._busy = float(self._file.row("SELECT total(seconds) FROM attempts")[0])
        return self._busy

    def add_driven(self, seconds: float) -> None:
        """Adds to the time that this process has driven the study."""
        with self._file.transaction():
            if self._run is None:
                begun = time.time() - seconds
                self._run = self._file.insert(
                    "runs", host=socket.gethostname(), pid=os.getpid(), started=begun, seconds=seconds
                )
            else:
                before = self._file.row("SELECT seconds FROM runs WHERE id = ?", (self._run,))[0]
                self._file.change("runs", self._run, seconds=before + seconds)

    def driven_seconds(self) -> float:
        """Seconds that drivers have run, all together."""
        return float(self._file.row("SELECT total(seconds) FROM runs")[0])

    def runs(self) -> list[Run]:
        """The drivers' runs, the oldest first."""
        return [
            Run(row["host"], row["pid"], row["started"], row["seconds"])
            for row in self._file.rows("SELECT * FROM runs ORDER BY id")
        ]

    def set_end(self, stage: int, island: int, generation: int, cause: str) -> None:
        """Notes that a budget ended an island of a stage after that generation."""
        with self._file.transaction():
            self._file.db.execute("DELETE FROM ends WHERE stage = ? AND island = ?", (stage, island))
            self._file.insert("ends", stage=stage, island=island, generation=generation, cause=cause)

    def ends(self) -> dict[tuple[int, int], int]:
        """(stage, island) -> generation that a budget ended it after."""
        return {
            (row["stage"], row["island"]): row["generation"]
            for row in self._file.rows("SELECT * FROM ends ORDER BY stage, island")
        }

    def causes(self) -> dict[tuple[int, int], str]:
        """(stage, island) -> why a budget ended it."""
        return {
            (row["stage"], row["island"]): row["cause"]
            for row in self._file.rows("SELECT * FROM ends ORDER BY stage, island")
        }

    def remove_ends(self) -> None:
        """Forgets them: a budget was made larger."""
        with self._file.transaction():
            self._file.db.execute("DELETE FROM ends")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._file.transaction():
            yield
        self._changed = True

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
        self._file.db.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe_id, recipe.canonical()))
        set_id = self._add_items(items)
        known = self._file.row(
            "SELECT id FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?",
            (recipe_id, role, set_id),
        )
        if known is not None:
            return int(known[0])
        rowid = self._file.insert(
            "evaluations", grows=True, recipe=recipe_id, role=role, item_set=set_id, score=score, error=evaluation.error,
            metrics=rows.numbers(evaluation.metrics), scores=json.dumps([s.value for s in evaluation.items]),
            seconds=rows.numbers(evaluation.seconds), created=time.time(), reported=reported,
            probabilities=rows.column([s.probability for s in evaluation.items]),
            logprobs=rows.column([s.logprob for s in evaluation.items]), costs=rows.numbers(evaluation.costs),
        )  # fmt: skip
        if point is not None and score is not None:
            self._add_to_front(rowid, role, set_id, point)
        return rowid

    def _add_to_front(self, evaluation: int, role: Purpose, set_id: str, point: tuple[float, ...]) -> None:
        sql = "SELECT f.* FROM front f JOIN evaluations e ON e.id = f.evaluation WHERE e.role = ? AND e.item_set = ?"
        held = [
            (int(row["evaluation"]), tuple(json.loads(row["point"])))
            for row in self._file.rows(sql, (role, set_id))
        ]
        if any(_dominates(other, point) for _, other in held):
            return
        self._file.db.executemany(
            "DELETE FROM front WHERE evaluation = ?",
            [(other,) for other, place in held if _dominates(point, place)],
        )
        self._file.insert("front", evaluation=evaluation, point=json.dumps(point))

    def _add_items(self, items: Items) -> str:
        set_id = item_set_id(items)
        self._file.db.execute(
            "INSERT OR IGNORE INTO item_sets VALUES (?, ?)", (set_id, rows.items_json(items))
        )
        return set_id

    def _scored(self, row: sqlite3.Row) -> Scored:
        if not integrity.intact(row):
            raise backup.damaged(
                self.path, f"the evaluation of {row['recipe']} on {row['role']} items is not what was stored"
            )
        body = self._file.row("SELECT body FROM item_sets WHERE id = ?", (row["item_set"],))
        with self._file.reading():
            return rows.scored(row, body[0])


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))
