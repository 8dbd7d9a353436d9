"""The pool that evaluates in this process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from evomerge.errors import MachineFault
from evomerge.workers.failure_policy import Limits
from evomerge.workers.pool import Job, PoolSettings, Scorer, execute
from evomerge.workers.scheduled_pool import ScheduledPool
from evomerge.workers.scheduler import Scheduler
from evomerge.workers.tries import Try
from evomerge.workers.worker_table import WorkerSlot


class InProcessPool(ScheduledPool):
    """One worker in this process, one job after the other, in the order they came. Satisfies `Pool`.

    pool = InProcessPool(worker)
    """

    def __init__(self, scorer: Scorer, limits: Limits | None = None) -> None:
        """A pool of one.

        Args:
            scorer: an open worker.
            limits: when an error is the machine's and when the search pauses; None for the defaults. Nobody
                can end a job of this process that takes too long.
        """
        super().__init__(Scheduler(limits, in_order=True))
        self._scorer = scorer
        self._number = 0
        self._join()

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> InProcessPool:
        """The pool from the settings that all pools share.

        Args:
            settings: `scorer` and `limits` are used.

        Returns:
            The pool.
        """
        return cls(settings.scorer, settings.limits)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs; they are evaluated as results are asked for. See `Pool.submit`."""
        self._scheduler.submit(jobs)

    def close(self) -> None:
        """Drops all jobs; nothing is held beside this process."""
        self._scheduler.drain()

    def _step(self, timeout: float) -> None:
        """Evaluates the next job, whatever time it takes; rests after an error of the machine.

        Raises:
            MachineFault: where this process can no longer use its device.
        """
        scheduler = self._scheduler
        if scheduler.retired:
            raise MachineFault(
                f"this process can no longer evaluate: {scheduler.retired[-1][1]}; start it again, "
                "or with --workers, whose processes are replaced"
            )
        begun = scheduler.assign(self._now())
        if begun:
            self._run(begun[0])
        else:
            time.sleep(min(timeout, max(0.0, scheduler.next_idle(self._now()) or 0.0)))

    def _join(self) -> None:
        self._number += 1
        host = socket.gethostname()
        self._worker = WorkerSlot(self._number, "driver", host, host, os.getpid(), "")
        self._scheduler.join(self._worker, self._now())

    def _run(self, execution: Try) -> None:
        """Executes a job."""
        try:
            done = execute(self._scorer, execution.job)
        except BaseException as error:  # nobody's failure: the job is queued again, and the pool can go on
            self._scheduler.leave(self._worker.number, "lost", type(error).__name__, self._now())
            self._scheduler.forget(execution.number)
            self._join()
            raise
        self._scheduler.finished(execution.number, done.evaluation, self._now(), done.seconds)
