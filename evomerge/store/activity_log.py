"""Activity in a study: attempts, worker time, runs of drivers, and islands that a budget ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from evomerge.evaluation import Attempt
from evomerge.store import rows
from evomerge.store.connection import StudyFile
from evomerge.store.records import BudgetEnd, Run, WorkerUse


class ActivityLog:
    """The activity in an open study file, as `Store.activity`::

    with Store.open(path) as store:
        for use in store.activity.worker_uses():
            print(use.worker, use.utilisation)
    """

    def __init__(self, file: StudyFile) -> None:
        """Reads and writes an open file.

        Args:
            file: The study's file, open for writing where something is to be added.
        """
        self._file = file
        self._busy_seconds: float | None = None  # sum over attempts, once it has been asked for
        self._run_row: int | None = None  # row of this process' run

    def add_attempts(self, attempts: Sequence[Attempt]) -> None:
        """Stores attempts in one transaction.

        Args:
            attempts: Attempts that have ended.
        """
        with self._file.transaction():
            for attempt in attempts:
                self._file.insert(
                    "attempts",
                    grows=True,
                    recipe=attempt.recipe_id,
                    number=attempt.number,
                    cause=attempt.cause,
                    error=attempt.error,
                    worker=attempt.worker,
                    host=attempt.host,
                    pid=attempt.pid,
                    device=attempt.device,
                    started=attempt.started,
                    seconds=attempt.seconds,
                    log=attempt.log,
                )
        if self._busy_seconds is not None:
            self._busy_seconds += sum(attempt.seconds for attempt in attempts)

    def attempts(self) -> list[Attempt]:
        """All attempts, in the order they were stored."""
        with self._file.reading():
            return [rows.attempt(row) for row in self._file.rows("SELECT * FROM attempts ORDER BY id")]

    def failures(self) -> list[tuple[str, int, str]]:
        """(cause, number of attempts, last error) of those that were not done, the most frequent first."""
        sql = (
            "SELECT cause, count(*), error, max(id) FROM attempts WHERE cause != 'done' "
            "GROUP BY cause ORDER BY count(*) DESC, cause"
        )
        return [(row[0], int(row[1]), row[2] or "") for row in self._file.rows(sql)]

    def worker_uses(self) -> list[WorkerUse]:
        """What each worker did, by name."""
        sql = (
            "SELECT worker, host, device, pid, cause, count(*) AS count, sum(seconds) AS seconds, "
            "min(started) AS first, max(started + seconds) AS last "
            "FROM attempts GROUP BY worker, host, device, pid, cause"
        )
        return rows.worker_uses(self._file.rows(sql))

    def busy_seconds(self) -> float:
        """Seconds that workers were at work, over all attempts."""
        if self._busy_seconds is None:
            self._busy_seconds = float(self._file.row("SELECT total(seconds) FROM attempts")[0])
        return self._busy_seconds

    def add_driven_seconds(self, seconds: float) -> None:
        """Adds to the time that this process has driven the study.

        Args:
            seconds: Time since the last call.
        """
        with self._file.transaction():
            if self._run_row is None:
                self._run_row = self._file.insert(
                    "runs",
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    started=time.time() - seconds,
                    seconds=seconds,
                )
            else:
                before = self._file.row("SELECT seconds FROM runs WHERE id = ?", (self._run_row,))[0]
                self._file.change("runs", self._run_row, seconds=before + seconds)

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
        """Notes that a budget ended an island of a stage, so that a replay ends there too.

        Args:
            stage: Number of the stage, from 0.
            island: Number of the island, from 0.
            generation: The last generation.
            cause: Which budget is used up, in words.
        """
        with self._file.transaction():
            self._file.db.execute("DELETE FROM ends WHERE stage = ? AND island = ?", (stage, island))
            self._file.insert("ends", stage=stage, island=island, generation=generation, cause=cause)

    def ends(self) -> dict[tuple[int, int], BudgetEnd]:
        """(stage, island) -> where a budget ended it, in that order."""
        return {
            (row["stage"], row["island"]): BudgetEnd(row["generation"], row["cause"])
            for row in self._file.rows("SELECT * FROM ends ORDER BY stage, island")
        }

    def remove_ends(self) -> None:
        """Removes all of `ends`, as a budget was made larger."""
        with self._file.transaction():
            self._file.db.execute("DELETE FROM ends")
