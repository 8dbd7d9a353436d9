"""Takes evaluations that failed by their machine out of a study, and all that was searched on their account.

Such a row ranked its candidate worst, and every generation after it learnt from that. What is left is a study
that was paused before: its next run scores anew what failed, and asks again from there. Evaluations that it
will ask for once more are kept.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from evomerge.store import backup, pareto_front, paths
from evomerge.store.connection import StudyFile
from evomerge.store.records import Purpose

TaskValues = Callable[[Mapping[str, float]], tuple[float, ...]]
"""Metrics -> the objective's values of the tasks, higher is better."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was taken out of a study.

    Attributes:
        evaluations: failed ones, which are made anew.
        trials: that are asked for again.
        generation: the first of them; None where the search itself stands.
        copy: the study as it was.
    """

    evaluations: int
    trials: int
    generation: int | None
    copy: Path


class Retry:
    """Takes failed evaluations out of an open study file, as `Store.retry`::

    with Store.open(path, write=True) as store:
        forgotten = store.retry.forget(is_worth_retrying, objective.task_values)
    """

    def __init__(self, file: StudyFile) -> None:
        """Takes an open file.

        Args:
            file: The study's file, open for writing where something is to be taken out.
        """
        self._file = file

    def forget(self, is_machines: Callable[[str], bool], task_values: TaskValues) -> Forgotten | None:
        """Takes failed evaluations out; the file as it was is kept, and the backups are made anew.

        Args:
            is_machines: Whether an error is to be tried again.
            task_values: Of the study's objective.

        Returns:
            What was taken out; None where no evaluation failed so, and nothing is changed.
        """
        file = self._file
        errors = file.rows("SELECT id, error FROM evaluations WHERE error IS NOT NULL")
        failed = {int(row["id"]) for row in errors if is_machines(row["error"])}
        if not failed:
            return None
        numbered = (file.path.with_name(paths.BEFORE_RETRY.format(i)) for i in itertools.count(1))
        copy = next(path for path in numbered if not path.exists())
        backup.write(file.db, file.path, copy)
        current = file.path.with_name(paths.BACKUP)
        for path in (current, backup.earlier(current)):  # they hold more: the file would be refused
            path.unlink(missing_ok=True)
        first = self._first_generation(failed)
        trials = 0
        with file.transaction():
            trials = self._remove_from(first, failed, task_values)
            file.change("study", 1, state="paused", outcome=None, finished=None)
        backup.write(file.db, file.path, current)
        return Forgotten(len(failed), trials, first, copy)

    def _first_generation(self, failed: set[int]) -> int | None:
        """The first generation that learnt from a failed evaluation, or has its trial; None for none."""
        trials = self._file.rows("SELECT * FROM trials ORDER BY generation, slot")
        generations = [int(row["generation"]) for row in trials if row["evaluation"] in failed]
        in_trials = {row["evaluation"] for row in trials}
        references = {row["recipe"] for row in trials if row["generation"] == 0}
        stage_of = {row["recipe"]: int(row["stage"]) for row in reversed(trials)}
        begins: dict[int, int] = {}
        for row in trials:
            begins.setdefault(row["stage"], row["generation"])
        for row in self._evaluations():
            if row["id"] not in failed:
                continue
            if row["role"] == "search" and row["id"] not in in_trials and row["recipe"] in references:
                generations.append(0)  # what a retention constraint compares with
            following = stage_of.get(row["recipe"], 0) + 1
            if row["role"] == "validation" and following in begins:
                generations.append(begins[following])  # which began from the best on validation
        return min(generations, default=None)

    def _remove_from(self, first: int | None, failed: set[int], task_values: TaskValues) -> int:
        """Removes what does not stand, within a transaction; how many trials."""
        file = self._file
        trials, ends = [], []
        if first is not None:
            trials = [r["id"] for r in file.rows("SELECT id FROM trials WHERE generation >= ?", (first,))]
            ends = [r["id"] for r in file.rows("SELECT id FROM ends WHERE generation >= ?", (first,))]
        removed = sorted(failed | self._of_later(first) | self._of_finals(first, failed))
        fronts = self._fronts(set(removed))
        file.acknowledge(removed=len(removed) + len(trials))
        for table, rowids in (
            ("front", removed),
            ("trials", trials),
            ("evaluations", removed),
            ("ends", ends),
        ):
            self._delete(table, rowids)
        for role, item_set in fronts:
            self._rebuild_front(role, item_set, task_values)
        self._remove_unused()
        return len(trials)

    def _of_later(self, first: int | None) -> set[int]:
        """Search evaluations that a search from a generation on may not ask for again.

        The others of that generation are asked for again, unless it was raced: then on other items, perhaps.
        """
        if first is None:
            return set()
        trials = self._file.rows("SELECT * FROM trials")
        in_rungs = {row["recipe"] for row in self._evaluations() if row["role"] == "rung"}
        of_first = [row for row in trials if row["generation"] == first and row["origin"] != "mean"]
        stays = [row for row in trials if row["generation"] < first]
        if not any(row["recipe"] in in_rungs for row in of_first):
            stays += of_first
        recipes, used = {row["recipe"] for row in stays}, {row["evaluation"] for row in stays}
        scored = [
            row for row in self._evaluations() if row["role"] in ("search", "rung", "gradient", "surrogate")
        ]
        later = {row["evaluation"] for row in trials} - used
        return later | {int(row["id"]) for row in scored if row["recipe"] not in recipes}

    def _of_finals(self, first: int | None, failed: set[int]) -> set[int]:
        """Validation and test evaluations of candidates that may be no finalists, or not the winner, then."""
        evaluations = self._evaluations()
        if first is not None:
            roles = {"validation", "test"}
        elif any(row["id"] in failed and row["role"] == "validation" for row in evaluations):
            roles = {"test"}
        else:
            return set()
        sql = "SELECT recipe FROM trials WHERE generation = 0"
        references = {row["recipe"] for row in self._file.rows(sql)}
        others = [row for row in evaluations if row["role"] in roles and row["recipe"] not in references]
        return {int(row["id"]) for row in others}

    def _fronts(self, removed: set[int]) -> list[tuple[Purpose, str]]:
        """(role, item set) of the Pareto fronts that removed evaluations were compared in."""
        in_trials = {row["evaluation"] for row in self._file.rows("SELECT evaluation FROM trials")}
        compared = [
            row
            for row in self._evaluations()
            if row["id"] in removed and (row["role"] == "validation" or row["id"] in in_trials)
        ]
        return sorted({(cast(Purpose, row["role"]), str(row["item_set"])) for row in compared})

    def _rebuild_front(self, role: Purpose, item_set: str, task_values: TaskValues) -> None:
        """The front of those that are left: one that was dominated by what is gone comes back."""
        left = self._file.rows(
            "SELECT e.id, e.metrics FROM evaluations e LEFT JOIN trials t ON t.evaluation = e.id "
            "WHERE e.role = ? AND e.item_set = ? AND e.score IS NOT NULL AND t.whole IS NULL GROUP BY e.id",
            (role, item_set),
        )
        self._delete("front", [row["id"] for row in left])
        for row in left:
            point = task_values(json.loads(row["metrics"]))
            pareto_front.add(self._file, row["id"], role, item_set, point)

    def _remove_unused(self) -> None:
        """Removes recipes and items that nothing refers to any more."""
        recipes = (
            "SELECT recipe FROM evaluations UNION SELECT recipe FROM trials "
            "UNION SELECT recipe FROM sensitivity UNION SELECT centre FROM sensitivity"
        )
        sets = "SELECT item_set FROM evaluations UNION SELECT item_set FROM sensitivity"
        for table, used in (("recipes", recipes), ("item_sets", sets)):
            unused = self._file.rows(f"SELECT rowid FROM {table} WHERE id NOT IN ({used})")
            self._delete(table, [row["rowid"] for row in unused])

    def _evaluations(self) -> list[sqlite3.Row]:
        return self._file.rows("SELECT id, recipe, role, item_set FROM evaluations")

    def _delete(self, table: str, rowids: Sequence[int]) -> None:
        self._file.db.executemany(f"DELETE FROM {table} WHERE rowid = ?", [(rowid,) for rowid in rowids])
