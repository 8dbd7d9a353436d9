"""Where candidates are evaluated: the `Pool` protocol, and the pool that evaluates in this process."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from evomerge.evaluation import Attempt, Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.workers.failure_policy import Limits


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe to score on items.

    Attributes:
        slot: the caller's number for it, unique among the jobs that are out.
        recipe: what to merge.
        items: what to score it on: task -> ids.
        cost: how long it is expected to take beside the others, in any unit; of a turn the longest begin
            first.
        turn: jobs of a lower turn begin first.
    """

    slot: int
    recipe: Recipe
    items: Items
    cost: float = 1.0
    turn: int = 0


class Scorer(Protocol):
    """What scores a recipe: `evomerge.workers.worker.Worker`."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe.

        Args:
            recipe: what to merge.
            items: task -> ids.

        Returns:
            The evaluation; whatever goes wrong with the candidate is in its `error`.
        """


class Pool(Protocol):
    """Evaluates jobs, in any order; a failed candidate is an Evaluation with an error.

    pool.submit([Job(0, recipe, items)])
    while pool.out:
        job, evaluation = pool.result()
    pool.close()
    """

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs.

        Args:
            jobs: to evaluate; others may be out already.
        """

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next job that is finished; each is returned once.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Returns:
            The job with its evaluation; None where nothing is out, or not within the timeout.
        """

    def drain(self) -> None:
        """Drops jobs that no worker has begun; results of those in flight still come."""

    @property
    def out(self) -> int:
        """How many results will still come."""

    def attempts(self) -> list[Attempt]:
        """The attempts that ended since this was last called, the oldest first."""

    def close(self) -> None:
        """Ends the workers; jobs in flight are dropped."""


@runtime_checkable
class DescribesWorkers(Protocol):
    """A pool that can say where its workers are."""

    def describe(self) -> str:
        """A line for each machine."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Everything that pools can be made with; each takes what it needs.

    Attributes:
        scorer: a worker that is open in this process.
        make: opens a worker in another process; it must be picklable. None where only `scorer` will do.
        workers: how many; None for as many as fit on the cluster.
        address: of a Ray cluster: 'local', 'auto' or HOST:PORT.
        cpus: CPUs of each worker on Ray, in shares too.
        gpus: GPUs of each worker on Ray, in shares below 1 too; None for one where the cluster has any.
        limits: when to give up on a job, a worker, a device; None for the defaults.
    """

    scorer: Scorer
    make: Callable[[], Scorer] | None = None
    workers: int | None = None
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    limits: Limits | None = None

    def required_make(self) -> Callable[[], Scorer]:
        """`make`, for pools that need it; raises ValueError where it is None."""
        if self.make is None:
            raise ValueError("this pool opens workers in other processes: `make` must be given")
        return self.make


@dataclass(frozen=True, slots=True)
class Execution:
    """An evaluation, and where and when a process of this machine made it.

    Attributes:
        evaluation: what the worker returned.
        pid: the process.
        started: unix seconds.
        seconds: that it took.
    """

    evaluation: Evaluation
    pid: int
    started: float
    seconds: float


def execute(scorer: Scorer, job: Job) -> Execution:
    """Evaluates a job in this process.

    Args:
        scorer: an open worker.
        job: to evaluate.

    Returns:
        The evaluation, with its time.
    """
    started, clock = time.time(), time.perf_counter()
    evaluation = scorer.evaluate(job.recipe, job.items)
    return Execution(evaluation, os.getpid(), started, time.perf_counter() - clock)


def attempt_of(job: Job, execution: Execution, worker: str, number: int = 1) -> Attempt:
    """The record of a job's execution on this machine.

    Args:
        job: that was executed.
        execution: its evaluation and time.
        worker: name of the worker.
        number: of the job's attempts, from 1.

    Returns:
        The attempt, with the cause 'done' or 'failed'.
    """
    error = execution.evaluation.error
    return Attempt(
        job.recipe.id,
        number,
        "failed" if error else "done",
        error,
        worker,
        socket.gethostname(),
        execution.pid,
        "",
        execution.started,
        execution.seconds,
    )


class InProcessPool:
    """One worker in this process, one job after the other, in the order they came. Satisfies `Pool`.

    pool = InProcessPool(worker)
    """

    def __init__(self, scorer: Scorer) -> None:
        """A pool of one.

        Args:
            scorer: an open worker.
        """
        self._scorer = scorer
        self._jobs: deque[Job] = deque()
        self._attempts: list[Attempt] = []

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> InProcessPool:
        """The pool from the settings that all pools share.

        Args:
            settings: `scorer` is used.

        Returns:
            The pool.
        """
        return cls(settings.scorer)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs; they are evaluated as results are asked for. See `Pool.submit`."""
        self._jobs.extend(jobs)

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """Evaluates the next job, whatever time it takes. See `Pool.result`."""
        if not self._jobs:
            return None
        job = self._jobs.popleft()
        execution = execute(self._scorer, job)
        self._attempts.append(attempt_of(job, execution, "driver"))
        return job, execution.evaluation

    def drain(self) -> None:
        """Drops all jobs: nothing is in flight between two results."""
        self._jobs.clear()

    @property
    def out(self) -> int:
        """Jobs that are not evaluated yet."""
        return len(self._jobs)

    def attempts(self) -> list[Attempt]:
        """One for each job that was evaluated since this was last called."""
        attempts, self._attempts = self._attempts, []
        return attempts

    def close(self) -> None:
        """Drops all jobs; nothing is held beside this process."""
        self._jobs.clear()
