"""Where candidates are evaluated: the `Pool` protocol and the pool that runs them in this process. No Ray here."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.evaluation import Attempt, Evaluation, Items
from evomerge.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe to score on items. slot: the caller's number for it, unique among the jobs that are out; turn: those of a lower one
    begin first; cost: how long it is expected to take beside the others, in any unit; of a turn the longest begin first."""

    slot: int
    recipe: Recipe
    items: Items
    cost: float = 1.0
    turn: int = 0


class Scorer(Protocol):
    """What scores a recipe: `evomerge.workers.worker.Worker`."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Whatever goes wrong is in the evaluation's `error`."""


class Pool(Protocol):
    """Evaluates jobs, in any order; a failed candidate is an Evaluation with an error."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs; others may be out already."""

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next job that is finished: each is given back once. None where nothing is out, or not within the timeout, in seconds."""

    def drain(self) -> None:
        """Drops what no worker has begun; what is in flight still comes."""

    @property
    def out(self) -> int:
        """How many results will still come."""

    def attempts(self) -> list[Attempt]:
        """The tries that ended since this was last asked, the oldest first."""

    def close(self) -> None:
        """Lets go of the workers; what is in flight is dropped."""


class InProcessPool:
    """One worker in this process, one job after the other, in the order they came. Satisfies `Pool`."""

    def __init__(self, worker: Scorer) -> None:
        self._worker = worker
        self._jobs: deque[Job] = deque()
        self._attempts: list[Attempt] = []

    def submit(self, jobs: Sequence[Job]) -> None:
        """They are evaluated as results are asked for."""
        self._jobs.extend(jobs)

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """Evaluates the next job, whatever time it takes."""
        if not self._jobs:
            return None
        job, started, clock = self._jobs.popleft(), time.time(), time.perf_counter()
        found = self._worker.evaluate(job.recipe, job.items)
        seconds = time.perf_counter() - clock
        self._attempts.append(ended(job, found, "driver", os.getpid(), started, seconds))
        return job, found

    def drain(self) -> None:
        """Nothing is in flight between two results."""
        self._jobs.clear()

    @property
    def out(self) -> int:
        """Jobs that are not evaluated yet."""
        return len(self._jobs)

    def attempts(self) -> list[Attempt]:
        """One for each job."""
        found, self._attempts = self._attempts, []
        return found

    def close(self) -> None:
        """Nothing is held beside this process."""
        self._jobs.clear()


def ended(
    job: Job, found: Evaluation, worker: str, pid: int, started: float, seconds: float, number: int = 1
) -> Attempt:
    """The attempt of a job that a worker of this machine's gave a result for."""
    cause = "failed" if found.error else "done"
    return Attempt(
        job.recipe.id, number, cause, found.error, worker, socket.gethostname(), pid, "", started, seconds
    )
