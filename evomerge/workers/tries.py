"""Executions of jobs by workers, and those of them that take too long."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from evomerge.evaluation import Attempt
from evomerge.workers.failure_policy import Limits
from evomerge.workers.job_queue import QueuedJob
from evomerge.workers.pool import Job
from evomerge.workers.process_activity import ProcessActivity
from evomerge.workers.time_limits import Watched
from evomerge.workers.worker_table import WorkerSlot


class Look(Protocol):
    """Says what the processes of workers do."""

    def at(self, workers: Sequence[WorkerSlot]) -> Mapping[int, ProcessActivity]:
        """Looks at processes, wherever they are.

        Args:
            workers: theirs.

        Returns:
            Worker's number -> what its process does; those of which nothing is known are left out.
        """

    def is_stopped(self, worker: WorkerSlot) -> bool:
        """Whether somebody stopped a process, as far as can be said at once.

        Args:
            worker: its.

        Returns:
            False for processes of other machines.
        """


@dataclass(slots=True, eq=False)
class Try:
    """An execution of a job by a worker.

    Attributes:
        number: its own, never used again.
        worker: who executes it.
        queued: the job and its history.
        started: unix seconds.
        nth: of its job's executions, from 1.
        is_alone: whether nothing else is to run on the worker's machine.
        prepares: whether its worker builds the candidate, probes and compiles, and has not begun to score.
        watched: the clock of what it is at: of the preparation, then of scoring.
    """

    number: int
    worker: WorkerSlot
    queued: QueuedJob
    started: float
    nth: int
    is_alone: bool = False
    prepares: bool = False
    watched: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.watched = Watched(self.started)

    @property
    def job(self) -> Job:
        """What is executed."""
        return self.queued.job

    def scoring_began(self, now: float) -> None:
        """Its worker has prepared everything and begins to score.

        Args:
            now: unix seconds.
        """
        self.prepares = False
        self.watched = Watched(now)

    def attempt(self, cause: str, error: str | None, seconds: float, log_lines: str) -> Attempt:
        """The record of it.

        Args:
            cause: how it ended, see `Attempt`.
            error: what went wrong; None if nothing did.
            seconds: that it took.
            log_lines: last lines of the worker's log.

        Returns:
            The attempt as it is stored.
        """
        worker = self.worker
        return Attempt(
            self.job.recipe.id,
            self.nth,
            cause,
            error,
            worker.name,
            worker.host,
            worker.pid,
            worker.device,
            self.started,
            seconds,
            log_lines,
        )


def late(
    running: Collection[Try],
    limit_of: Callable[[Try], float],
    limits: Limits,
    now: float,
    look: Look | None,
) -> list[tuple[Try, str, str]]:
    """The executions that are to be given up.

    Args:
        running: all that workers are at.
        limit_of: execution -> seconds that what it is at may take.
        limits: how much longer a process may take that computes.
        now: unix seconds.
        look: says what processes do; one of which it says nothing hangs at its limit.

    Returns:
        Each with 'hung' or 'frozen', and a line that says why.
    """
    found: list[tuple[Try, str, str]] = []
    over = [execution for execution in running if now - execution.watched.since > limit_of(execution)]
    activities = look.at([execution.worker for execution in over]) if over and look else {}
    for execution in running:
        seconds, limit, cause = now - execution.watched.since, limit_of(execution), None
        if seconds > limit:
            seen = activities.get(execution.worker.number)
            cause = execution.watched.verdict(limit, limits, now, seen)
        elif seconds > limits.floor and look and look.is_stopped(execution.worker):
            cause, limit = "frozen", limits.floor
        if cause is not None:
            what = "was not ready to score" if execution.prepares else "gave no result"
            error = f"{what} after {seconds:.0f} s, the limit is {limit:.0f} s"
            stopped = "its process was stopped by somebody, and " if cause == "frozen" else ""
            found.append((execution, cause, stopped + error))
    return found
