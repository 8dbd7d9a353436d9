"""What the pools have in common: a scheduler, a clock, and the wait for the next result."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.pool import Job, JobReport
from evomerge.workers.scheduler import Scheduler

CHECK_SECONDS = 1.0
"""Between two checks of what takes too long."""


class ScheduledPool(ABC):
    """A pool whose jobs a `Scheduler` gives out; subclasses execute them."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Begins without jobs.

        Args:
            scheduler: Without workers.
        """
        self._scheduler = scheduler
        self._clock_offset = time.time() - time.monotonic()

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next job that is finished. See `Pool.result`.

        Raises:
            MachineFault: where the machine fails at every job.
            SetupError: where workers fail again and again and nothing is ever done.
        """
        scheduler = self._scheduler
        end = None if timeout is None else time.monotonic() + timeout
        while not scheduler.results:
            if not scheduler.out:
                return None
            scheduler.raise_if_hopeless()
            left = CHECK_SECONDS if end is None else max(0.0, end - time.monotonic())
            self._step(min(left, CHECK_SECONDS))
            if not scheduler.results and end is not None and time.monotonic() >= end:
                return None
        return scheduler.results.popleft()

    def drain(self) -> None:
        """Drops jobs that no worker has begun; what then fails in flight is dropped too."""
        self._scheduler.drain()

    @property
    def out(self) -> int:
        """How many results will still come."""
        return self._scheduler.out

    def attempts(self) -> list[Attempt]:
        """The attempts that ended since this was last called."""
        attempts, self._scheduler.attempts = self._scheduler.attempts, []
        return attempts

    @abstractmethod
    def _step(self, timeout: float) -> None:
        """Waits until something happens, at most `timeout` seconds, and reacts to it."""

    def _now(self) -> float:
        """Unix seconds that never go back."""
        return self._clock_offset + time.monotonic()

    def _finished(self, number: int, report: JobReport, now: float) -> None:
        """Hands what a process says of an execution to the scheduler."""
        self._scheduler.finished(
            number, report.evaluation, now, report.seconds, report.memory, report.log, report.scoring
        )
