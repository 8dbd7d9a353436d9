"""A worker in a process of this machine: what runs in the process, and the driver's end of it.

The driver's end never blocks: a process that somebody stopped answers nothing and takes nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.workers.last_lines import LastLines
from evomerge.workers.pool import Job, JobReport, Scorer, execute, one_line
from evomerge.workers.process_activity import private_memory
from evomerge.workers.safe_path import SafeContext, safe_path, variables
from evomerge.workers.time_limits import Watched
from evomerge.workers.worker_table import WorkerSlot

_AT_ONCE = 16_384  # bytes that a pipe takes though nobody reads
_ENDING_SECONDS = 5.0  # until a process that was killed, or closed its pipe, is gone


@dataclass(frozen=True, slots=True)
class Opened:
    """A process has opened its worker."""


@dataclass(frozen=True, slots=True)
class NotOpened:
    """A process could not open its worker. error: one line."""

    error: str


@dataclass(frozen=True, slots=True)
class ScoringBegan:
    """A process has prepared a job and begins to score it. number: of the execution."""

    number: int


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a job. number: of the execution."""

    number: int
    of_job: JobReport


@dataclass(frozen=True, slots=True)
class Gone:
    """A process has ended."""


Message = Opened | NotOpened | ScoringBegan | Report | EvomergeError | Gone
"""What comes of a process; an error is one that no candidate is to blame for."""


class WorkerProcess:
    """The driver's end of a worker process.

    Attributes:
        name: of its place in the pool, kept when the process is replaced.
        pid: the process.
        watched: the clock of its opening.
        worker: the scheduler's record of it; None until it is open.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Scorer],
        messages: queue.SimpleQueue[tuple[WorkerProcess, Message]],
        now: float,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Starts the process, which opens its worker.

        Args:
            name: of its place in the pool.
            make: opens a worker; it must be picklable.
            messages: what comes of it is put there.
            now: unix seconds.
            environment: variables that the process has beside this one's, from its start on.
        """
        context = SafeContext()
        with safe_path():
            resource_tracker.ensure_running()  # a process too, which the first child would start
        self.name = name
        self.watched = Watched(now)
        self.worker: WorkerSlot | None = None
        self._messages = messages
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), name=f"evomerge {name}")
        try:
            with variables(environment):
                self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        threading.Thread(target=self._read, daemon=True).start()

    def evaluate(self, number: int, job: Job) -> None:
        """Hands a job to the process, which is open and idle.

        Args:
            number: of the execution.
            job: what to evaluate.
        """
        data = pickle.dumps((number, job))
        if len(data) <= _AT_ONCE:
            self._send(data)
        else:
            threading.Thread(target=self._send, args=(data,), daemon=True).start()

    def let_end(self) -> None:
        """Asks an idle process to end by itself, so that it removes its semaphores."""
        with contextlib.suppress(OSError, ValueError):  # it is gone
            half = socket.socket(fileno=os.dup(self._connection.fileno()))
            with half:
                half.shutdown(socket.SHUT_WR)

    def join(self, seconds: float) -> None:
        """Waits for a process that was asked to end.

        Args:
            seconds: to wait at most.
        """
        self._process.join(seconds)

    def end(self) -> str:
        """Kills the process, if it lives still.

        Returns:
            How it ended, in words.
        """
        self._process.kill()
        self._process.join(_ENDING_SECONDS)
        return self._how()

    def how_it_ended(self) -> str:
        """How the process ended that is gone, in words."""
        self._process.join(_ENDING_SECONDS)
        if self._process.exitcode is None:  # its pipe is closed, and it lives
            return self.end()
        return self._how()

    def _how(self) -> str:
        code = self._process.exitcode
        if code is None:
            return "its process does not end"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone, which its pipe tells
            self._connection.send_bytes(data)

    def _read(self) -> None:
        """In a thread of its own: puts what the process sends into the queue, until it is gone."""
        try:
            while True:
                self._messages.put((self, self._connection.recv()))
        except (EOFError, OSError, pickle.UnpicklingError):
            pass
        finally:
            self._messages.put((self, Gone()))
            self._connection.close()


# ---- in the process ----------------------------------------------------------------------------------------


def _serve(connection: Connection, make: Callable[[], Scorer]) -> None:
    """Opens a worker and evaluates what is sent, until the pipe is closed.

    Signals are the driver's to answer, and its death ends the process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log_lines = LastLines.installed()
    try:
        scorer = make()
    except Exception as error:
        connection.send(NotOpened(one_line(error)))
        return
    connection.send(Opened())
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_evaluated(connection, scorer, log_lines, *connection.recv()))


def _evaluated(connection: Connection, scorer: Scorer, log_lines: LastLines, number: int, job: Job) -> Any:
    """What comes of a job."""
    log_lines.lines.clear()
    try:
        done = execute(scorer, job, lambda: connection.send(ScoringBegan(number)))
    except EvomergeError as error:
        return error
    log = "\n".join(log_lines.lines) if done.evaluation.error else ""
    return Report(number, JobReport(done.evaluation, done.seconds, done.scoring, private_memory(), log))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
