"""Several workers in processes of this machine: the `Pool` protocol without Ray, for the cores of one computer.

Results come in the order of the jobs, so that a study's rows are those of one worker. A process that dies is replaced and
its jobs are run again; a job that is there at three deaths is the cause, and fails.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType

from evomerge.errors import SetupError
from evomerge.evaluation import Evaluation
from evomerge.pools import Job
from evomerge.worker import Worker

log = logging.getLogger(__name__)
_STRIKES = 3  # deaths of a process that a job may be there at
_PATIENCE = 2.0  # seconds that a process is given to end by itself
_worker: Worker | None = None  # of a child process


class ProcessPool:
    """Satisfies `evomerge.pools.Pool`. A context manager that ends its processes; they also end when this one is killed."""

    def __init__(self, make: Callable[[], Worker], workers: int) -> None:
        """make: opens a worker, called once in each process; it must be picklable. Raises SetupError if none can be opened."""
        self._make, self._workers = make, workers
        self._executor = self._start()
        try:
            self._executor.submit(_opened).result()
        except BrokenProcessPool:
            self.close()
            raise SetupError("a worker process could not be opened; run with one worker to see why") from None

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; what is in flight is dropped after two seconds."""
        children = list((getattr(self._executor, "_processes", None) or {}).values())  # shutdown alone would wait for them
        self._executor.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.join(_PATIENCE)
            child.kill()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Evaluation]]:
        """Yields in the order of the jobs."""
        strikes: Counter[int] = Counter()
        waiting = dict(enumerate(jobs))
        futures: dict[int, Future[Evaluation]] = {}
        try:
            while waiting:
                try:
                    for number, job in waiting.items():
                        if number not in futures and strikes[number] < _STRIKES:
                            futures[number] = self._executor.submit(_evaluate, job)
                    for number, job in list(waiting.items()):
                        evaluation = futures[number].result() if number in futures else _poison(job)
                        del waiting[number]
                        yield job, evaluation
                except BrokenProcessPool:
                    lost = [n for n in waiting if n in futures and (not futures[n].done() or futures[n].exception() is not None)]
                    strikes.update(lost[: self._workers])  # they were in flight, the first in the queue
                    futures = {n: f for n, f in futures.items() if n not in lost}
                    log.warning("a worker process died; it is replaced, and %d candidates are run again", len(lost))
                    self._executor = self._start()
        finally:
            for future in futures.values():
                future.cancel()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _open, (self._make,))


def _poison(job: Job) -> Evaluation:
    return Evaluation(job.recipe.id, (), {}, {}, error=f"{_STRIKES} worker processes died while it was evaluated")


def _open(make: Callable[[], Worker]) -> None:
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


def _evaluate(job: Job) -> Evaluation:
    assert _worker is not None
    return _worker.evaluate(job.recipe, job.items)
