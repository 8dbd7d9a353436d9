"""Several workers in processes of this machine: the `Pool` protocol without Ray, for the cores of one computer.

Results come as they are finished. A process that dies is replaced and what was in flight is run again; a job that is there
at three deaths is the cause, and fails.
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
from concurrent.futures import wait as first_of
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType

from evomerge.errors import SetupError
from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.pool import Job, Scorer, ended

log = logging.getLogger(__name__)
_STRIKES = 3  # deaths of a process that a job may be there at
_PATIENCE = 2.0  # seconds that a process is given to end by itself
_worker: Scorer | None = None  # of a child process


class ProcessPool:
    """Satisfies `evomerge.workers.pool.Pool`. A context manager that ends its processes; they also end when this one is killed."""

    def __init__(self, make: Callable[[], Scorer], workers: int) -> None:
        """make: opens a worker, called once in each process; it must be picklable. Raises SetupError if none can be opened."""
        self._make, self._workers = make, workers
        self._waiting: dict[int, Job] = {}  # by number, those that are out, in the order they begin
        self._futures: dict[int, Future[tuple[Evaluation, int, float, float]]] = {}
        self._strikes: Counter[int] = Counter()
        self._count = 0
        self._attempts: list[Attempt] = []
        self._executor = self._start()
        try:
            self._executor.submit(_opened).result()
        except BrokenProcessPool:
            self.close()
            raise SetupError("a worker process could not be opened; run with one worker to see why") from None

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; what is in flight is dropped after two seconds."""
        children = list(
            (getattr(self._executor, "_processes", None) or {}).values()
        )  # shutdown alone would wait for them
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.join(_PATIENCE)
            child.kill()

    def submit(self, jobs: Sequence[Job]) -> None:
        """The longest begin first, of those handed over together."""
        for job in sorted(jobs, key=lambda job: (job.turn, -job.cost)):
            self._waiting[self._count] = job
            self._count += 1

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next that is finished."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._waiting:
            try:
                for number in self._waiting:
                    if self._strikes[number] >= _STRIKES:
                        return self._taken(number), _poison(self._waiting.pop(number))
                    if number not in self._futures:
                        self._futures[number] = self._executor.submit(_evaluate, self._waiting[number])
                left = None if end is None else max(0.0, end - time.monotonic())
                finished, _ = first_of(self._futures.values(), left, FIRST_COMPLETED)
                if not finished:
                    return None
                number = next(n for n, future in self._futures.items() if future in finished)
                found, pid, started, seconds = self._futures[number].result()
                job = self._taken(number)
                del self._waiting[number]
                self._attempts.append(
                    ended(
                        job, found, f"process {pid}", pid, started, seconds, self._strikes.pop(number, 0) + 1
                    )
                )
                return job, found
            except BrokenProcessPool:
                self._replace()
        return None

    def drain(self) -> None:
        """Drops what no process has begun, or is about to: a process has one job in reserve."""
        for number, future in list(self._futures.items()):
            if future.cancel():
                self._taken(number)
                del self._waiting[number]
        for number in [n for n in self._waiting if n not in self._futures]:
            del self._waiting[number]

    @property
    def out(self) -> int:
        """How many results will still come."""
        return len(self._waiting)

    def attempts(self) -> list[Attempt]:
        """The tries that ended since this was last asked."""
        found, self._attempts = self._attempts, []
        return found

    def _taken(self, number: int) -> Job:
        """A job whose future is no longer looked at."""
        self._futures.pop(number, None)
        return self._waiting[number]

    def _replace(self) -> None:
        """A process died, and with it the executor: what was in flight gets a strike, and all that is not finished begins again."""
        lost = [
            n
            for n in self._waiting
            if n in self._futures
            and (not self._futures[n].done() or self._futures[n].exception() is not None)
        ]
        now = time.time()
        for number in lost[: self._workers]:  # they were in flight, the first in the queue
            self._strikes[number] += 1
            job = self._waiting[number]
            told = ended(
                job,
                Evaluation(job.recipe.id, (), {}, {}, error="a worker process died"),
                "process",
                0,
                now,
                0.0,
                self._strikes[number],
            )
            self._attempts.append(replace(told, cause="died"))
        for number in lost:
            del self._futures[number]
        log.warning("a worker process died; it is replaced, and %d candidates are run again", len(lost))
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _open, (self._make,))


def _poison(job: Job) -> Evaluation:
    return Evaluation(
        job.recipe.id, (), {}, {}, error=f"poison: {_STRIKES} worker processes died while it was evaluated"
    )


def _open(make: Callable[[], Scorer]) -> None:
    """In a child: opens its worker; signals are the driver's to answer, and its death ends the child."""
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _opened() -> bool:
    return _worker is not None


def _evaluate(job: Job) -> tuple[Evaluation, int, float, float]:
    """(what came of it, this process, when it began, seconds)."""
    assert _worker is not None
    started, clock = time.time(), time.perf_counter()
    found = _worker.evaluate(job.recipe, job.items)
    return found, os.getpid(), started, time.perf_counter() - clock
