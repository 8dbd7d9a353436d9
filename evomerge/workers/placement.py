"""Which idle worker gets which waiting job: suspects alone on their machine, others wherever they may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from evomerge.workers.failure_policy import Limits
from evomerge.workers.job_queue import JobQueue, QueuedJob
from evomerge.workers.tries import Try
from evomerge.workers.worker_table import WorkerSlot, WorkerTable


class Placement:
    """Pairs of idle workers and waiting jobs, see `pairs`."""

    def __init__(self, queue: JobQueue, workers: WorkerTable, limits: Limits) -> None:
        """Looks at a queue and a table of workers that others change.

        Args:
            queue: the waiting jobs.
            workers: the workers.
            limits: which jobs are suspects.
        """
        self._queue = queue
        self._workers = workers
        self._limits = limits
        self._alone: set[int] = set()  # numbers of workers that were given a suspect

    def pairs(
        self, running: Mapping[int, Try], num_tries: int
    ) -> Iterator[tuple[WorkerSlot, QueuedJob, bool]]:
        """The jobs that begin now: they are taken out of the queue, workers stay among the idle ones.

        A suspect, which one failure more would decide, runs with nothing beside it on its machine: others
        wait until what runs there has ended.

        Args:
            running: number of a worker -> what it is at.
            num_tries: executions that were begun so far.

        Yields:
            A worker, its job, and whether that is to be alone on the worker's machine.
        """
        if not self._queue.waiting:
            return
        idle = self._workers.idle()
        self._alone = {n for n in self._alone if n in running and running[n].is_alone}
        closed = {running[n].worker.host for n in self._alone}
        if idle and self._queue.retries:
            for worker, queued in self._suspects(idle, running, closed, num_tries):
                self._alone.add(worker.number)
                yield worker, queued, True
        for worker in idle:
            if not self._queue.waiting:
                return
            following = None if worker.host in closed else self._next(worker, num_tries)
            if following is not None:
                yield worker, following, False

    def _suspects(
        self, idle: list[WorkerSlot], running: Mapping[int, Try], closed: set[str], num_tries: int
    ) -> list[tuple[WorkerSlot, QueuedJob]]:
        """Suspects that begin now; their machines, and one for each that waits, are added to `closed`."""
        found: list[tuple[WorkerSlot, QueuedJob]] = []
        for queued in [q for q in self._queue.retries if q.failures.is_suspect(self._limits)]:
            busy = {execution.worker.host for execution in running.values()}
            free = [w for w in idle if w.host not in closed and self._may_retry(queued, w, num_tries)]
            worker = next((w for w in free if w.host not in busy), None)
            if worker is not None:
                self._queue.take_retry(queued)
                found.append((worker, queued))
                closed.add(worker.host)
            elif free:
                closed.add(free[0].host)
        return found

    def _next(self, worker: WorkerSlot, num_tries: int) -> QueuedJob | None:
        def may_retry(queued: QueuedJob) -> bool:
            is_suspect = queued.failures.is_suspect(self._limits)
            return not is_suspect and self._may_retry(queued, worker, num_tries)

        return self._queue.take(may_retry)

    def _may_retry(self, queued: QueuedJob, worker: WorkerSlot, num_tries: int) -> bool:
        """Whether no better worker is there for a job tried before: on another device, else another one."""
        if num_tries <= queued.after and self._others_wait(queued, num_tries):
            return False
        failed = queued.failures.failed
        domains = {failure.failure_domain for failure in failed}
        if worker.failure_domain not in domains:
            return True
        if self._workers.has_other_domain(domains):
            return False
        numbers = {failure.worker for failure in failed}
        return worker.number not in numbers or not self._workers.has_other_worker(numbers)

    def _others_wait(self, queued: QueuedJob, num_tries: int) -> bool:
        """Whether there is another job that may go first after a machine error: it shows how that is."""
        others = (other for other in self._queue.retries if other is not queued)
        return self._queue.has_fresh or any(other.after < num_tries for other in others)
