"""An execution of a job by a worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from evomerge.evaluation import Attempt
from evomerge.workers.job_queue import QueuedJob
from evomerge.workers.pool import Job
from evomerge.workers.time_limits import Watched
from evomerge.workers.worker_table import WorkerSlot


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
