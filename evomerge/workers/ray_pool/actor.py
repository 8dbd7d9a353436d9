"""What runs in a process of Ray's: opens a worker, scores what it is handed, says where it is and what it holds."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import cloudpickle

from evomerge._redaction import ScrubbedFormatter, scrub
from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.workers.pool import Scorer

_LINES = 20  # of the log that go with a failure


@dataclass(frozen=True, slots=True)
class Where:
    """Where an actor is. device: 'cpu', or 'cuda:' and the numbers of its GPUs on the node; errors: the file its stderr goes to."""

    host: str
    pid: int
    device: str
    errors: str


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a job. seconds: that it took; memory: bytes that the process holds after it; log: last lines, of a failure."""

    evaluation: Evaluation
    seconds: float
    memory: int
    log: str = ""


class Actor:
    """A worker behind Ray's calls, one at a time. It ends with its driver, whose business all signals are."""

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        self._lines = _Lines()
        logging.getLogger().addHandler(self._lines)
        logging.getLogger("evomerge").setLevel(logging.INFO)
        self._worker: Scorer | None = None

    def where(self) -> Where:
        """Answers as soon as Ray has placed the actor."""
        gpus = ",".join(str(i) for i in ray.get_gpu_ids())
        return Where(socket.gethostname(), os.getpid(), f"cuda:{gpus}" if gpus else "cpu", _target(2))

    def open(self, make: bytes, path: Sequence[str], environment: Mapping[str, str]) -> None:
        """Makes the worker; raises what that raises. make: a pickled function without arguments; path: where its modules may be found;
        environment: the driver's variables that the worker goes by."""
        os.environ.update(environment)
        sys.path += [folder for folder in path if folder not in sys.path]
        self._worker = cloudpickle.loads(make)()

    def evaluate(self, recipe: Recipe, items: Items) -> Report:
        """Scores one candidate."""
        assert self._worker is not None
        self._lines.kept.clear()
        clock = time.perf_counter()
        found = self._worker.evaluate(recipe, items)
        seconds = time.perf_counter() - clock
        return Report(found, seconds, _resident(), "\n".join(self._lines.kept) if found.error else "")


class _Lines(logging.Handler):
    """Keeps the last lines that were logged, without secrets."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: deque[str] = deque(maxlen=_LINES)
        self.setFormatter(ScrubbedFormatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(self.format(record))


def _resident() -> int:
    """Bytes of its own that this process has in memory, mapped parents left out; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _target(descriptor: int) -> str:
    """The file that a descriptor of this process writes to; empty where the system does not say."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def end(pid: int) -> None:
    """Kills a process of Ray's on this node, if it is still that; a frozen one does not hear Ray's own request."""
    try:
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def tail(file: str, lines: int = _LINES) -> str:
    """The last lines of a log file on this node, without secrets; empty where it cannot be read."""
    try:
        with Path(file).open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - 8192))
            text = opened.read().decode(errors="replace")
    except OSError:
        return ""
    found = [
        line
        for line in scrub(text).splitlines()
        if line.strip() and not line.startswith((":actor_name:", ":job_id:"))
    ]
    return "\n".join(found[-lines:])
