"""Where candidates are evaluated: the `Pool` protocol and the pool that runs them in this process. No Ray here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.evaluation import Evaluation, Items
from evomerge.recipe import Recipe
from evomerge.worker import Worker


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe to score on items. slot: the caller's number for it."""

    slot: int
    recipe: Recipe
    items: Items


class Pool(Protocol):
    """Evaluates jobs, in any order; a failed candidate is an Evaluation with an error."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Evaluation]]:
        """Yields each job once with its evaluation, as they finish."""
        ...

    def close(self) -> None:
        """Lets go of the workers."""
        ...


class InProcessPool:
    """One worker in this process, one job after the other. Satisfies `Pool`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Evaluation]]:
        """Yields in the order of the jobs."""
        for job in jobs:
            yield job, self._worker.evaluate(job.recipe, job.items)

    def close(self) -> None:
        """Nothing is held beside this process."""
