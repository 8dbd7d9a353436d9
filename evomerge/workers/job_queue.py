"""The jobs of a pool without a result: by turn, the longest first, those tried before at the front."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation import Evaluation
from evomerge.workers.failure_policy import JobFailures
from evomerge.workers.pool import Job


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job until its result is settled, and as long as a late one may come.

    Attributes:
        job: what was submitted.
        failures: its failed executions.
        settled: whether it has its result, or was dropped.
        answer: the evaluation that a worker gave; None for one that the scheduler made.
        after: it is tried again once more tries than these were begun, so that others speak for the machine.
    """

    job: Job
    failures: JobFailures = field(default_factory=JobFailures)
    settled: bool = False
    answer: Evaluation | None = None
    after: int = -1


class JobQueue:
    """Jobs in the order that they begin. An operation costs no more than the logarithm of the queue."""

    def __init__(self, *, in_order: bool = False) -> None:
        """An empty queue.

        Args:
            in_order: jobs begin in the order they came, whatever their turn and cost.
        """
        self._in_order = in_order
        self._fresh: list[tuple[int, float, int, QueuedJob]] = []  # heap of (turn, -cost, number, job)
        self._retries: list[QueuedJob] = []  # first in line
        self._unsettled: dict[int, QueuedJob] = {}  # by the job's slot
        self._count = 0

    @property
    def waiting(self) -> int:
        """Jobs that no worker is at."""
        return len(self._fresh) + len(self._retries)

    @property
    def has_fresh(self) -> bool:
        """Whether there are jobs that no worker was ever at."""
        return bool(self._fresh)

    @property
    def retries(self) -> list[QueuedJob]:
        """Jobs that failed and wait for another try, the first in line first."""
        return list(self._retries)

    @property
    def unsettled(self) -> int:
        """Jobs without a result."""
        return len(self._unsettled)

    def add(self, jobs: Sequence[Job]) -> None:
        """Takes jobs into the queue.

        Args:
            jobs: each with a slot of its own.

        Raises:
            ValueError: for a slot whose job has no result yet.
        """
        for job in jobs:
            if job.slot in self._unsettled:
                raise ValueError(f"slot {job.slot} is out already; a job needs a number of its own")
            queued = QueuedJob(job)
            self._unsettled[job.slot] = queued
            self._count += 1
            turn, cost = (0, 0.0) if self._in_order else (job.turn, job.cost)
            heapq.heappush(self._fresh, (turn, -cost, self._count, queued))

    def take(self, may_retry: Callable[[QueuedJob], bool]) -> QueuedJob | None:
        """Removes the next job for a worker from the waiting ones.

        Args:
            may_retry: whether the worker may do a job that was tried before.

        Returns:
            The job; None where there is none for it.
        """
        for i, queued in enumerate(self._retries):
            if may_retry(queued):
                return self._retries.pop(i)
        return heapq.heappop(self._fresh)[3] if self._fresh else None

    def take_retry(self, queued: QueuedJob) -> None:
        """Removes a certain job from those that wait for another try.

        Args:
            queued: the job.
        """
        self._retries.remove(queued)

    def retry(self, queued: QueuedJob) -> None:
        """Puts a job that failed back in line.

        Args:
            queued: the job, not settled.
        """
        self._retries.append(queued)

    def settle(self, queued: QueuedJob) -> None:
        """Takes a job out: it has its result, or nobody waits for it.

        Args:
            queued: the job, not settled.
        """
        if queued in self._retries:
            self._retries.remove(queued)
        queued.settled = True
        del self._unsettled[queued.job.slot]

    def drop_waiting(self) -> None:
        """Settles all jobs that no worker is at."""
        waiting = [*(queued for *_, queued in self._fresh), *self._retries]
        self._fresh = []
        self._retries = []
        for queued in waiting:
            self.settle(queued)
