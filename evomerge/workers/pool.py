"""Where candidates are evaluated: the `Pool` protocol, what pools are made with, the execution of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from evomerge._redaction import scrub
from evomerge.errors import EvomergeError
from evomerge.evaluation import Attempt, Evaluation, GradientRequest, Items
from evomerge.recipes import Recipe
from evomerge.workers.failure_policy import Limits
from evomerge.workers.machine_errors import (
    breaks_device,
    is_machine_error,
    is_only_machines,
    wants_memory,
)


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
        gradient: the loss, and perhaps its derivatives, that are wanted in place of the tasks' own metrics;
            None for those.
        answers: whether the model's answers are wanted beside the tasks' metrics.
    """

    slot: int
    recipe: Recipe
    items: Items
    cost: float = 1.0
    turn: int = 0
    gradient: GradientRequest | None = None
    answers: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the tasks' own metrics are all that is wanted."""
        return self.gradient is None and not self.answers


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

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        """Scores a recipe by a differentiable loss, with the derivatives by its coefficients.

        Args:
            recipe: what to merge.
            items: task -> ids.
            request: the loss.

        Returns:
            The evaluation; whatever goes wrong with the candidate is in its `error`.
        """

    def answers(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe and collects what the model answers.

        Args:
            recipe: what to merge.
            items: task -> ids.

        Returns:
            The evaluation; whatever goes wrong with the candidate is in its `error`.
        """


@runtime_checkable
class PreparingScorer(Protocol):
    """A scorer that can do apart what comes before scoring, so that time limits are those of scoring."""

    def prepare(self, recipe: Recipe, items: Items) -> None:
        """Builds a candidate, probes and compiles; `evaluate` of the same recipe and items is to follow.

        Args:
            recipe: what to merge.
            items: task -> ids.
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
        devices: names of the cards that processes of this machine share, as `CUDA_VISIBLE_DEVICES` has them;
            none where they all see what this process does.
    """

    scorer: Scorer
    make: Callable[[], Scorer] | None = None
    workers: int | None = None
    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    limits: Limits | None = None
    devices: Sequence[str] = ()

    def required_make(self) -> Callable[[], Scorer]:
        """`make`, for pools that need it; raises ValueError where it is None."""
        if self.make is None:
            raise ValueError("this pool opens workers in other processes: `make` must be given")
        return self.make


@dataclass(frozen=True, slots=True)
class Execution:
    """An evaluation, and how long it took.

    Attributes:
        evaluation: what the worker returned.
        seconds: that it took, with what came before scoring.
        scoring: of them, those from when it began to score.
    """

    evaluation: Evaluation
    seconds: float
    scoring: float


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a process that executed a job says of it.

    Attributes:
        evaluation: what the worker returned.
        seconds: that it took.
        scoring: of them, those from when it began to score.
        memory: bytes that the process holds after it; 0 where unknown.
        log: last lines that were logged, where it failed.
    """

    evaluation: Evaluation
    seconds: float
    scoring: float
    memory: int
    log: str = ""


def execute(scorer: Scorer, job: Job, scoring_began: Callable[[], None] = lambda: None) -> Execution:
    """Evaluates a job in this process.

    Args:
        scorer: an open worker.
        job: to evaluate.
        scoring_began: called when what comes before scoring is done.

    Returns:
        The evaluation with its times. What the scorer raises is the evaluation's error.

    Raises:
        EvomergeError: what the scorer raises of that kind: no candidate is to blame.
    """
    began = time.perf_counter()
    failed = prepare(scorer, job)
    if failed is not None:
        return Execution(failed, time.perf_counter() - began, 0.0)
    scoring = time.perf_counter()
    scoring_began()
    evaluation = score(scorer, job)
    end = time.perf_counter()
    return Execution(evaluation, end - began, end - scoring)


def prepare(scorer: Scorer, job: Job) -> Evaluation | None:
    """Does what comes before the scoring of a job, where the scorer can do that apart.

    Args:
        scorer: an open worker.
        job: to be scored.

    Returns:
        None; the evaluation of a job that failed here.

    Raises:
        EvomergeError: what the scorer raises of that kind.
    """
    try:
        if isinstance(scorer, PreparingScorer) and job.is_plain:
            scorer.prepare(job.recipe, job.items)
    except EvomergeError:
        raise
    except Exception as error:
        return Evaluation(job.recipe.id, (), {}, {}, error=one_line(error))
    return None


def score(scorer: Scorer, job: Job) -> Evaluation:
    """Scores a job in this process.

    Args:
        scorer: an open worker.
        job: to score.

    Returns:
        The evaluation. What the scorer raises is its error.

    Raises:
        EvomergeError: what the scorer raises of that kind.
    """
    try:
        if job.gradient is not None:
            return scorer.slopes(job.recipe, job.items, job.gradient)
        if job.answers:
            return scorer.answers(job.recipe, job.items)
        return scorer.evaluate(job.recipe, job.items)
    except EvomergeError:
        raise
    except Exception as error:  # of a scorer that does not catch what goes wrong
        return Evaluation(job.recipe.id, (), {}, {}, error=one_line(error))


def one_line(error: BaseException) -> str:
    """The text of an error, without secrets; of a wrapped error of the machine also that.

    Args:
        error: what was raised.

    Returns:
        One line; the class is named unless it is evomerge's own.
    """
    text = _text(error)
    cause = error.__cause__ or error.__context__
    while cause is not None and not is_machine_error(text):
        why = _text(cause)
        if is_only_machines(why) or wants_memory(why) or breaks_device(why):
            text = f"{text} (because of {why})"
        cause = cause.__cause__ or cause.__context__
    return text


def _text(error: BaseException) -> str:
    text = str(error) if isinstance(error, EvomergeError) else f"{type(error).__name__}: {error}"
    return " ".join(scrub(text).split())
