"""The store of a study: its trials, evaluations and recipes, in one SQLite file."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from evomerge._escaping import one_line
from evomerge.errors import StudyError
from evomerge.evaluation import Items, Role
from evomerge.recipes import Recipe
from evomerge.store import backup, evaluation_rows, integrity, locks, pareto_front, paths, rows
from evomerge.store.activity_log import ActivityLog
from evomerge.store.connection import StudyFile
from evomerge.store.records import (
    NewEvaluation,
    NewSensitivity,
    NewTrial,
    Purpose,
    Scored,
    StudyRow,
    Trial,
)
from evomerge.store.retry import Retry
from evomerge.store.rows import TrialReader
from evomerge.store.study_facts import Outcome, StudyFacts
from evomerge.store.usage import Usage

log = logging.getLogger(__name__)


class Store:
    """An open study file, and a context manager that closes it::

        with Store.open(Path("results/demo/study.db")) as store:
            for trial in store.trials():
                print(trial.id, trial.score)

    Attributes:
        path: The file.
        activity: Attempts, worker time, runs of drivers and ends by a budget.
        usage: How far the search has come, and what its test items were used for.
        reading: Makes a context in which values that nobody stored raise StudyError.
        retry: Takes evaluations that failed by their machine out.
    """

    def __init__(self, file: StudyFile) -> None:
        """Takes an open file; `Store.open` opens one.

        Args:
            file: The open file, which is closed with the store.
        """
        self._file = file
        self.path = file.path
        self.activity = ActivityLog(file)
        self.usage = Usage(file)
        self.reading = file.reading
        self.retry = Retry(file)
        self._backed_up = time.monotonic()  # when the last backup was made, or the store opened
        self._changed = False  # whether something was stored since

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> Store:
        """Opens a study file.

        To write, the whole file is checked first: a search does not go on from what was not stored.

        Args:
            path: The file.
            write: Open it for writing, and create it where it is missing. One process at a time may.

        Returns:
            The store.

        Raises:
            StudyError: The file is missing, gone, damaged, of a newer version, or another process writes it.
            NoRoom: Its disk is full.
            SetupError: It may not be read or written.
        """
        return cls(StudyFile.open(path, write))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and releases its locks."""
        self._file.close()

    def discard(self, keep: Container[str] = ()) -> None:
        """Closes the file and removes it, for a study that did not begin; backups stay.

        Args:
            keep: Names of files in its folder that are not to be removed.
        """
        self._file.discard(keep)

    # ---- the study's own row ------------------------------------------------------------------------------

    def begin(
        self, name: str, seed: int, config: str, overrides: Mapping[str, int], facts: StudyFacts
    ) -> None:
        """Writes the study's own row, once.

        Args:
            name: Name of the study.
            seed: Seed of the search.
            config: The search file, verbatim.
            overrides: Key of the search file -> the number that a flag replaces it by.
            facts: What the study's scores depend on beside its settings.
        """
        texts = [json.dumps(value, sort_keys=True) for value in (overrides, facts.to_json())]
        rest: dict[str, Any] = {"state": "running", "overrides": texts[0], "facts": texts[1]}
        with self._file.transaction():
            self._file.insert("study", id=1, name=name, seed=seed, config=config, created=time.time(), **rest)

    def study(self) -> StudyRow | None:
        """The study's own row, None in a file where none has begun; its name is that of its folder."""
        row = self._file.row("SELECT * FROM study")
        with self._file.reading():
            study = None if row is None else rows.study(row)
        if study is None or self.path.name != paths.STORE:
            return study
        return replace(study, name=one_line(self.path.absolute().parent.name))

    def set_state(self, state: str) -> None:
        """Stores the state of the search.

        Args:
            state: 'running', 'paused', 'failed' or 'done'.
        """
        self._change_study(state=state)

    def set_config(self, name: str, config: str, overrides: Mapping[str, int], facts: StudyFacts) -> None:
        """Replaces the stored configuration, of which only the budget and places may have changed.

        Args:
            name: Name of the study, which follows its folder.
            config: The search file, verbatim.
            overrides: Key of the search file -> the number that a flag replaces it by.
            facts: The stored facts with the places of now.
        """
        texts = [json.dumps(value, sort_keys=True) for value in (overrides, facts.to_json())]
        self._change_study(name=name, config=config, overrides=texts[0], facts=texts[1])

    def finish(self, outcome: Outcome) -> None:
        """Marks the study done.

        Args:
            outcome: What the search found.
        """
        self._change_study(
            state="done", outcome=json.dumps(outcome.to_json(), sort_keys=True), finished=time.time()
        )

    def _change_study(self, **values: Any) -> None:
        with self._file.transaction():
            self._file.change("study", 1, **values)

    # ---- writing trials and evaluations -------------------------------------------------------------------

    def add_trial(self, trial: NewTrial) -> Trial:
        """Stores a trial with its recipe and search evaluation, in one transaction.

        Args:
            trial: The trial. An evaluation of its recipe on the same items that is stored already stands.

        Returns:
            The trial as stored.
        """
        with self._writing():
            evaluation_row = evaluation_rows.add(self._file, trial.search_evaluation)
            trial_id = trial.trial_id
            if trial_id is not None and self._file.row("SELECT 1 FROM trials WHERE id = ?", (trial_id,)):
                trial_id = None
            trial_row = self._file.insert(
                "trials",
                grows=True,
                id=trial_id,
                generation=trial.generation,
                slot=trial.slot,
                origin=trial.origin,
                label=trial.label,
                genome=None if trial.genome is None else json.dumps(trial.genome),
                parents=json.dumps(trial.parents),
                recipe=trial.recipe.id,
                evaluation=evaluation_row,
                dropped=trial.dropped,
                whole=trial.whole,
                violation=trial.violation,
                stage=trial.stage,
                island=trial.island,
            )
        return self.trial(trial_row)

    def add_evaluation(self, evaluation: NewEvaluation) -> None:
        """Stores an evaluation that is no trial's (validation, test, a rung) in one transaction.

        Args:
            evaluation: The evaluation. One of the same recipe, role and items that is stored already stands.
        """
        with self._writing():
            evaluation_rows.add(self._file, evaluation)

    def add_sensitivity(self, point: NewSensitivity) -> None:
        """Stores a point of a sensitivity scan in one transaction.

        Args:
            point: A candidate evaluated with one coefficient changed.
        """
        with self._writing():
            evaluation_rows.add_sensitivity(self._file, point)

    # ---- reading trials and evaluations -------------------------------------------------------------------

    def evaluation(self, recipe_id: str, role: Purpose, items: Items) -> Scored | None:
        """Looks up an evaluation of a recipe on exactly some items.

        Args:
            recipe_id: Id of the recipe.
            role: What the evaluation was for.
            items: Task -> item ids, in order.

        Returns:
            The evaluation, None where there is none.
        """
        row = self._file.row(
            "SELECT * FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?",
            (recipe_id, role, rows.item_set_id(items)),
        )
        return None if row is None else evaluation_rows.scored(self._file, row)

    def evaluations(self, recipe_id: str) -> list[tuple[Role, Scored]]:
        """Reads all evaluations of a recipe but those of rungs, and of looks at test items, see `Usage`.

        Args:
            recipe_id: Id of the recipe.

        Returns:
            (role, evaluation), the oldest first.
        """
        evaluations = self._file.rows(
            "SELECT * FROM evaluations WHERE recipe = ? AND role NOT IN "
            "('rung', 'look', 'gradient', 'labels', 'surrogate') ORDER BY id",
            (recipe_id,),
        )
        return [(row["role"], evaluation_rows.scored(self._file, row)) for row in evaluations]

    def scored(self, trial: Trial) -> Scored:
        """Reads the evaluation that a trial's own score comes from.

        Args:
            trial: A stored trial.

        Returns:
            Its evaluation on the search items.
        """
        row = self._file.row(
            "SELECT e.* FROM trials t JOIN evaluations e ON e.id = t.evaluation WHERE t.id = ?", (trial.id,)
        )
        return evaluation_rows.scored(self._file, row)

    def front(self, role: Role) -> list[Trial]:
        """Reads the Pareto front over tasks of a role's newest set of items.

        Args:
            role: The role of the items; for the search, the front is that of one generation.

        Returns:
            The candidates that no other dominates, the earliest first.
        """
        return [self.trial(trial_id) for trial_id in pareto_front.trial_ids(self._file, role)]

    def sensitivity(self, centre_id: str, role: Role, items: Items) -> dict[tuple[str, float], Scored]:
        """Reads the points of a candidate's sensitivity scan.

        Args:
            centre_id: Id of the candidate's recipe.
            role: Role of the items.
            items: Exactly the items of the scan.

        Returns:
            (axis, value) -> evaluation, in the order they were stored.
        """
        sql = "SELECT * FROM sensitivity WHERE centre = ? AND role = ? AND item_set = ? ORDER BY id"
        return {
            (row["axis"], row["value"]): evaluation_rows.scored(self._file, row)
            for row in self._file.rows(sql, (centre_id, role, rows.item_set_id(items)))
        }

    def trial(self, trial_id: int) -> Trial:
        """Reads a trial.

        Args:
            trial_id: Its number.

        Returns:
            The trial.

        Raises:
            StudyError: There is no trial of that number.
        """
        row = self._file.row(rows.TRIALS + " WHERE t.id = ?", (trial_id,))
        if row is None:
            raise StudyError(
                f"{self.path.parent.name} has no candidate {trial_id}; it has 1 to {self.count_trials()}"
            )
        with self._file.reading():
            return rows.trial(row)

    def trial_at(self, generation: int, slot: int) -> Trial | None:
        """Reads the trial of a generation and slot.

        Args:
            generation: The generation, from 0.
            slot: The place in it, from 0.

        Returns:
            The trial, None where it has not been evaluated.
        """
        row = self._file.row(rows.TRIALS + " WHERE t.generation = ? AND t.slot = ?", (generation, slot))
        with self._file.reading():
            return None if row is None else rows.trial(row)

    def trials(self, reader: TrialReader | None = None) -> list[Trial]:
        """All trials, by generation and slot.

        Args:
            reader: What read them before, for whoever reads a growing file again and again.

        Returns:
            The trials.
        """
        found = self._file.rows(rows.TRIALS + " ORDER BY t.generation, t.slot")
        with self._file.reading():
            return (reader or TrialReader()).read(found)

    def last_trial_before(self, generation: int) -> int:
        """Finds the last trial of the generations before one.

        Args:
            generation: The generation.

        Returns:
            The highest id of trials of earlier generations, 0 where there are none.
        """
        sql = "SELECT coalesce(max(id), 0) FROM trials WHERE generation < ?"
        return int(self._file.row(sql, (generation,))[0])

    def count_trials(self) -> int:
        """Number of trials."""
        return int(self._file.row("SELECT count(*) FROM trials")[0])

    def count_evaluations(self) -> dict[str, int]:
        """Role -> number of evaluations; 'failed' -> those with an error, rungs of races not counted."""
        counts = self._file.rows(
            "SELECT role, count(*), sum(error IS NOT NULL AND role NOT IN ('rung', 'gradient', 'surrogate')) "
            "FROM evaluations GROUP BY role"
        )
        return {row[0]: row[1] for row in counts} | {"failed": sum(row[2] for row in counts)}

    def recipe(self, recipe_id: str) -> Recipe:
        """Reads a recipe.

        Args:
            recipe_id: Its id.

        Returns:
            The recipe.

        Raises:
            StudyError: There is none of that id, or what is stored is damaged.
        """
        return evaluation_rows.recipe(self._file, recipe_id)

    # ---- the file -----------------------------------------------------------------------------------------

    def is_driven(self) -> bool:
        """Whether a process holds the study open for writing now."""
        driver = locks.driver(self.path)
        return driver is not None and driver.alive is not False

    def check(self) -> str:
        """Reads the whole file: 'ok', or what is damaged, see `evomerge.store.integrity.check`."""
        return integrity.check(self._file.db, self.path)

    def way_back(self) -> str:
        """How to go back to the backup, in a sentence, for a store whose check is not 'ok'."""
        return backup.way_back(self.path)

    def backup(self, to: Path | None = None) -> Path:
        """Copies the store while it is open; a copy that is there is always whole.

        Args:
            to: File to write, study.backup.db beside the store where None.

        Returns:
            The file that was written.

        Raises:
            StudyError: The store is damaged; the copy before is kept.
            OSError, sqlite3.Error: The copy cannot be written.
        """
        to = to or self.path.with_name(paths.BACKUP)
        backup.write(self._file.db, self.path, to)
        return to

    def backup_every(self, minutes: float) -> Path | None:
        """Backs up if it is time, and something was stored since the last backup or the store was opened.

        Cheap to call between results. A copy that cannot be written is a warning: the search goes on.

        Args:
            minutes: Least time between two backups.

        Returns:
            The file that was written, None where none was.

        Raises:
            StudyError: The store is damaged; the copy before is kept.
        """
        if not self._changed or time.monotonic() - self._backed_up < 60 * minutes:
            return None
        self._backed_up, self._changed = time.monotonic(), False
        try:
            return self.backup()
        except (OSError, sqlite3.Error) as error:
            log.warning("%s could not be backed up: %s", self.path, error)
            return None

    # ---- parts of a transaction ---------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._file.transaction():
            yield
        self._changed = True
