"""Several workers in processes of this machine: the `Pool` protocol for the cores of one computer.

Results come as they are finished. A process that dies is replaced and what was in flight is run again; a job
that was in flight at three deaths is the cause, and fails.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import TracebackType

from evomerge.errors import SetupError
from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.pool import Execution, Job, PoolSettings, Scorer, attempt_of, execute
from evomerge.workers.safe_path import SafeContext, safe_path

log = logging.getLogger(__name__)
_MOST_DEATHS = 3  # of a process while a job is in flight, before that is the job's result
_CLOSING_SECONDS = 2.0  # that a process is given to end by itself
_scorer: Scorer | None = None  # of a child process


class ProcessPool:
    """Workers in processes of this machine. Satisfies `evomerge.workers.pool.Pool`.

    A context manager that ends its processes; they also end when this one is killed.

        with ProcessPool(functools.partial(open_worker, settings), workers=4) as pool:
            pool.submit(jobs)
    """

    def __init__(self, make: Callable[[], Scorer], workers: int) -> None:
        """Starts the processes and waits until one has opened its worker.

        Args:
            make: opens a worker, called once in each process; it must be picklable.
            workers: how many processes.

        Raises:
            SetupError: where none can be opened.
        """
        self._make = make
        self._workers = workers
        self._jobs: dict[int, Job] = {}  # by number, those that are out, in the order they begin
        self._futures: dict[int, Future[Execution]] = {}
        self._deaths: Counter[int] = Counter()
        self._count = 0
        self._attempts: list[Attempt] = []
        self._executor = self._start()
        try:
            self._executor.submit(_is_open).result()
        except BrokenProcessPool:
            self.close()
            raise SetupError("a worker process could not be opened; run with one worker to see why") from None

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> ProcessPool:
        """The pool from the settings that all pools share.

        Args:
            settings: `make` and `workers` are used; one process where the number is None.

        Returns:
            The pool.
        """
        return cls(settings.required_make(), settings.workers or 1)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; jobs in flight are dropped after two seconds."""
        # shutdown alone would wait for the processes, and forgets them
        processes = getattr(self._executor, "_processes", None) or {}
        children = list(processes.values())
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.join(_CLOSING_SECONDS)
            child.kill()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs; the longest begin first, of those handed over together. See `Pool.submit`."""
        for job in sorted(jobs, key=lambda job: (job.turn, -job.cost)):
            self._jobs[self._count] = job
            self._count += 1

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next job that is finished. See `Pool.result`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._jobs:
            poisonous = next((n for n in self._jobs if self._deaths[n] >= _MOST_DEATHS), None)
            if poisonous is not None:
                job = self._remove(poisonous)
                return job, _poison(job)
            try:
                self._hand_out()
                left = None if end is None else max(0.0, end - time.monotonic())
                finished, _ = wait_for_futures(self._futures.values(), left, FIRST_COMPLETED)
                if not finished:
                    return None
                number = next(n for n, future in self._futures.items() if future in finished)
                execution = self._futures[number].result()
            except BrokenProcessPool:
                self._replace()
                continue
            attempt_number = self._deaths.pop(number, 0) + 1
            job = self._remove(number)
            self._attempts.append(attempt_of(job, execution, f"process {execution.pid}", attempt_number))
            return job, execution.evaluation
        return None

    def drain(self) -> None:
        """Drops jobs that no process has begun, or is about to: a process has one job in reserve."""
        for number, future in list(self._futures.items()):
            if future.cancel():
                self._remove(number)
        for number in [n for n in self._jobs if n not in self._futures]:
            self._remove(number)

    @property
    def out(self) -> int:
        """How many results will still come."""
        return len(self._jobs)

    def attempts(self) -> list[Attempt]:
        """The attempts that ended since this was last called."""
        attempts, self._attempts = self._attempts, []
        return attempts

    def _hand_out(self) -> None:
        """Gives the executor all jobs that it does not have."""
        for number, job in self._jobs.items():
            if number not in self._futures:
                self._futures[number] = self._executor.submit(_evaluate, job)

    def _remove(self, number: int) -> Job:
        """Takes out a job that is finished or dropped."""
        self._futures.pop(number, None)
        return self._jobs.pop(number)

    def _replace(self) -> None:
        """A process died, and with it the executor: what is not finished begins again, in new processes."""
        lost = [number for number in self._jobs if self._is_lost(number)]
        now = time.time()
        for number in lost[: self._workers]:  # they were in flight, the first in the queue
            self._deaths[number] += 1
            job = self._jobs[number]
            evaluation = Evaluation(job.recipe.id, (), {}, {}, error="a worker process died")
            attempt = attempt_of(job, Execution(evaluation, 0, now, 0.0), "process", self._deaths[number])
            self._attempts.append(replace(attempt, cause="died"))
        for number in lost:
            del self._futures[number]
        log.warning("a worker process died; it is replaced, and %d candidates are run again", len(lost))
        self._executor = self._start()

    def _is_lost(self, number: int) -> bool:
        """Whether a job was handed to an executor that is broken now, and has no result."""
        future = self._futures.get(number)
        return future is not None and (not future.done() or future.exception() is not None)

    def _start(self) -> ProcessPoolExecutor:
        with safe_path():
            resource_tracker.ensure_running()  # a process too, which the first lock would start
        return ProcessPoolExecutor(self._workers, SafeContext(), _open, (self._make,))


def _poison(job: Job) -> Evaluation:
    error = f"poison: {_MOST_DEATHS} worker processes died while it was evaluated"
    return Evaluation(job.recipe.id, (), {}, {}, error=error)


def _open(make: Callable[[], Scorer]) -> None:
    """In a child: opens its worker; signals are the driver's to answer, and its death ends the child."""
    global _scorer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _scorer = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _is_open() -> bool:
    return _scorer is not None


def _evaluate(job: Job) -> Execution:
    """In a child: evaluates a job with its worker."""
    assert _scorer is not None
    return execute(_scorer, job)
