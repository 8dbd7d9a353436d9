"""Several workers in processes of this machine: the `Pool` protocol for the cores of one computer.

Results come as they are finished. Which process does which job, and what a failure means, is decided in
`evomerge.workers.scheduler`; here processes are started, given jobs, watched and ended.
"""

from __future__ import annotations

import atexit
import logging
import queue
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from evomerge.workers.failure_policy import Limits
from evomerge.workers.pool import Job, PoolSettings, Scorer
from evomerge.workers.process_activity import ProcessActivity, activity
from evomerge.workers.process_devices import VARIABLE, device_of
from evomerge.workers.scheduled_pool import CHECK_SECONDS, ScheduledPool
from evomerge.workers.scheduler import Scheduler
from evomerge.workers.worker_process import (
    Gone,
    Message,
    NotOpened,
    Opened,
    Report,
    ScoringBegan,
    WorkerProcess,
)
from evomerge.workers.worker_table import WorkerSlot

log = logging.getLogger(__name__)
_ENDING_SECONDS = 3.0  # that all processes have to end by themselves when a pool is closed


class ProcessPool(ScheduledPool):
    """Workers in processes of this machine. Satisfies `evomerge.workers.pool.Pool`.

    A context manager that ends its processes; they also end when this one is killed.

        with ProcessPool(functools.partial(open_worker, settings), workers=4) as pool:
            pool.submit(jobs)
    """

    def __init__(
        self,
        make: Callable[[], Scorer],
        workers: int,
        limits: Limits | None = None,
        devices: Sequence[str] = (),
    ) -> None:
        """Starts the processes and waits until one has opened its worker.

        Args:
            make: opens a worker, called once in each process; it must be picklable.
            workers: how many processes.
            limits: when to give up on a job or a process; None for the defaults.
            devices: names of the cards that the processes share, see `process_devices`; none where candidates
                are evaluated on the CPU, or all processes see what this one does.

        Raises:
            SetupError: where none can be opened.
        """
        self._make = make
        super().__init__(Scheduler(limits))
        self._scheduler.expected_workers = workers
        self._host = socket.gethostname()
        self._messages: queue.SimpleQueue[tuple[WorkerProcess, Message]] = queue.SimpleQueue()
        names = [f"process {i}" for i in range(workers)]
        self._processes: dict[str, WorkerProcess | None] = dict.fromkeys(names)
        self._cards = {name: device_of(i, devices) for i, name in enumerate(names)}
        self._due = dict.fromkeys(self._processes, 0.0)  # name -> when a lacking one may be started
        self._count = 0
        self._checked_at = 0.0
        atexit.register(self.close)
        try:
            while not self._open:
                self._scheduler.raise_if_hopeless()
                self._step(CHECK_SECONDS)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> ProcessPool:
        """The pool from the settings that all pools share.

        Args:
            settings: `make`, `workers`, `limits` and `devices` are used; one process where the number is
                None.

        Returns:
            The pool.
        """
        return cls(settings.required_make(), settings.workers or 1, settings.limits, settings.devices)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; jobs in flight are dropped."""
        atexit.unregister(self.close)
        self._scheduler.drain()
        processes = [process for process in self._processes.values() if process is not None]
        self._processes = {}
        for process in processes:
            process.let_end()
        until = time.monotonic() + _ENDING_SECONDS
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            process.end()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs; the longest begin first, of those handed over together. See `Pool.submit`."""
        self._scheduler.submit(jobs)
        self._hand_out()

    # ---- one turn of the event loop ------------------------------------------------------------------------

    @property
    def _open(self) -> dict[int, WorkerProcess]:
        """Number of a worker -> its process, those that are open."""
        there = [p for p in self._processes.values() if p is not None]
        return {p.worker.number: p for p in there if p.worker is not None}

    def _step(self, timeout: float) -> None:
        """Waits until something happens, at most `timeout` seconds, and reacts to it."""
        now = self._now()
        if now - self._checked_at >= CHECK_SECONDS:
            self._check(now)
        self._start_due(now)
        self._hand_out()
        pauses = [due - now for name, due in self._due.items() if self._processes.get(name) is None]
        rest = self._scheduler.next_idle(now)
        wait = max(0.0, min([timeout, *pauses, *([] if rest is None else [rest])]))
        try:
            process, message = self._messages.get(timeout=wait) if wait else self._messages.get_nowait()
            while True:  # all that are there
                self._take(process, message, self._now())
                process, message = self._messages.get_nowait()
        except queue.Empty:
            pass
        self._replace_retired()
        self._hand_out()

    def _start_due(self, now: float) -> None:
        """Starts a process wherever one is lacking and its pause is over."""
        for name, process in self._processes.items():
            if process is None and self._due[name] <= now:
                card = self._cards[name]
                environment = {} if card is None else {VARIABLE: card}
                self._processes[name] = WorkerProcess(name, self._make, self._messages, now, environment)

    def _hand_out(self) -> None:
        """Gives idle processes the jobs that they may do."""
        begun = self._scheduler.assign(self._now(), prepares=True)
        processes = self._open if begun else {}
        for execution in begun:
            processes[execution.worker.number].evaluate(execution.number, execution.job)

    def _take(self, process: WorkerProcess, message: Message, now: float) -> None:
        """Reacts to what came of a process."""
        if isinstance(message, Report):  # of one that was ended too: it may be the first result
            self._finished(message.number, message.of_job, now)
        elif isinstance(message, ScoringBegan):
            self._scheduler.scoring_began(message.number, now)
        elif self._processes.get(process.name) is not process:
            return  # it was ended, and another has taken its place
        elif isinstance(message, Opened):
            self._count += 1
            domain, device = self._failure_domain(process.name), self._cards[process.name]
            process.worker = WorkerSlot(
                self._count,
                process.name,
                domain or self._host,
                self._host,
                process.pid,
                f"cuda:{device}" if device else "",
            )
            self._scheduler.join(process.worker, now)
        elif isinstance(message, NotOpened):
            self._start_failed(process, message.error, now)
        elif isinstance(message, Gone):
            self._gone(process, now)
        else:
            raise message

    def _failure_domain(self, name: str) -> str:
        """What a process shares with those of its card; empty where processes have none of their own."""
        card = self._cards[name]
        return "" if card is None else f"{self._host} cuda:{card}"

    def _gone(self, process: WorkerProcess, now: float) -> None:
        """A process has ended: what it was at is tried elsewhere, and another is started."""
        how = process.how_it_ended()
        if process.worker is None:
            self._start_failed(process, f"{how} before its worker was open", now)
            return
        log.warning("worker %s (pid %d) is gone: %s", process.name, process.pid, how)
        self._scheduler.leave(process.worker.number, "died", how, now)
        self._end(process, now)

    def _start_failed(self, process: WorkerProcess, error: str, now: float) -> None:
        log.warning("worker %s could not be opened: %s", process.name, error)
        self._scheduler.start_failed(process.name, self._failure_domain(process.name), error)
        self._end(process, now)

    def _end(self, process: WorkerProcess, now: float) -> None:
        """Ends a process; another is started in its place after a pause."""
        process.end()
        self._processes[process.name] = None
        self._due[process.name] = now + self._scheduler.backoff(process.name)

    # ---- what takes too long -------------------------------------------------------------------------------

    def _check(self, now: float) -> None:
        """Ends processes whose job or start takes too long."""
        self._checked_at = now
        for worker in self._scheduler.overdue(now, _Look()):
            self._end(self._open[worker.number], now)
        limits = self._scheduler.limits
        for process in [p for p in self._processes.values() if p is not None and p.worker is None]:
            if process.watched.verdict(limits.opening, limits, now, activity(process.pid)):
                self._start_failed(process, f"a worker was not open after {limits.opening:g} s", now)

    def _replace_retired(self) -> None:
        """Ends the processes of workers that the scheduler retired."""
        while self._scheduler.retired:
            worker, _ = self._scheduler.retired.pop()
            self._end(self._open[worker.number], self._now())


class _Look:
    """Looks at processes of this machine. Satisfies `tries.Look`."""

    def at(self, workers: Sequence[WorkerSlot]) -> Mapping[int, ProcessActivity]:
        """See `Look.at`."""
        found = {worker.number: activity(worker.pid) for worker in workers}
        return {number: seen for number, seen in found.items() if seen is not None}

    def is_stopped(self, worker: WorkerSlot) -> bool:
        """See `Look.is_stopped`."""
        seen = activity(worker.pid)
        return seen is not None and seen.is_stopped
