"""What runs in a process of Ray: opens a worker, scores recipes, reports its location and its memory."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import cloudpickle

from evomerge._redaction import scrub
from evomerge.evaluation import Evaluation
from evomerge.workers.last_lines import LOG_LINES, LastLines
from evomerge.workers.pool import Job, JobReport, Scorer, prepare, score
from evomerge.workers.process_activity import private_memory

_TAIL_BYTES = 8192  # of a log file that are read
_RAY_LINES = (":actor_name:", ":job_id:")  # how lines begin that Ray writes for itself


@dataclass(frozen=True, slots=True)
class ActorLocation:
    """Where an actor is.

    Attributes:
        host: name of the machine.
        pid: its process.
        device: 'cpu', or 'cuda:' and the numbers of its GPUs on the node.
        errors: the file that its stderr goes to.
    """

    host: str
    pid: int
    device: str
    errors: str


class Actor:
    """A worker behind Ray's calls, one at a time. It ends with its driver, which alone reacts to signals."""

    def __init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        self._log_lines = LastLines.installed()
        self._scorer: Scorer | None = None
        self._preparing = 0.0  # seconds, of the job that is to be scored next
        self._failed: Evaluation | None = None  # of a job that could not be prepared

    def where(self) -> ActorLocation:
        """Its location, as soon as Ray has placed the actor."""
        gpus = ",".join(str(i) for i in ray.get_gpu_ids())
        device = f"cuda:{gpus}" if gpus else "cpu"
        return ActorLocation(socket.gethostname(), os.getpid(), device, _descriptor_file(2))

    def open(self, make: bytes, path: Sequence[str], environment: Mapping[str, str]) -> None:
        """Opens the worker; raises what that raises.

        Args:
            make: a pickled function without arguments that returns the worker.
            path: folders where its modules may be found.
            environment: the driver's variables that decide what the worker computes.
        """
        os.environ.update(environment)
        sys.path += [folder for folder in path if folder not in sys.path]
        self._scorer = cloudpickle.loads(make)()

    def prepare(self, job: Job) -> None:
        """Does what comes before the scoring of a job; `evaluate` of the same is to follow.

        Args:
            job: to be scored.
        """
        assert self._scorer is not None
        self._log_lines.lines.clear()
        began = time.perf_counter()
        self._failed = prepare(self._scorer, job)
        self._preparing = time.perf_counter() - began

    def evaluate(self, job: Job) -> JobReport:
        """Scores a job that is prepared.

        Args:
            job: to score.

        Returns:
            The evaluation with its time, the memory held, and the log of a failure.
        """
        assert self._scorer is not None
        began = time.perf_counter()
        evaluation = self._failed or score(self._scorer, job)
        scoring = time.perf_counter() - began
        log_lines = "\n".join(self._log_lines.lines) if evaluation.error else ""
        return JobReport(evaluation, self._preparing + scoring, scoring, private_memory(), log_lines)


def _descriptor_file(descriptor: int) -> str:
    """The file that a descriptor of this process writes to; empty where the system does not say."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def kill_process(pid: int) -> None:
    """Kills a process of Ray's on this node; a frozen one does not react to Ray's own request.

    Args:
        pid: the process; nothing is done where it is another program's by now.
    """
    try:
        if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


def last_lines(file: str, count: int = LOG_LINES) -> str:
    """The last lines of a log file on this node, without secrets.

    Args:
        file: its path.
        count: how many lines at most, from the last 8 KiB.

    Returns:
        The lines; empty where it cannot be read.
    """
    try:
        with Path(file).open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL_BYTES))
            text = opened.read().decode(errors="replace")
    except OSError:
        return ""
    lines = scrub(text).splitlines()
    return "\n".join([line for line in lines if line.strip() and not line.startswith(_RAY_LINES)][-count:])
