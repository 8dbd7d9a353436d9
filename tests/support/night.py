"""A scheduler with workers at places that are named by letters, and a clock that is set by hand."""

from __future__ import annotations

import functools
from dataclasses import replace

from evomerge.evaluation import Attempt, Evaluation, ItemScore
from evomerge.recipes import Recipe
from evomerge.workers import Job, Limits
from evomerge.workers.scheduler import Scheduler
from evomerge.workers.tries import Try
from evomerge.workers.worker_table import WorkerSlot
from tests.support.toy import weight_space

SPACE = weight_space()
ITEMS = {"first": ("a", "b")}
CUDA = "AcceleratorError: CUDA error: an illegal memory access was encountered at 0x7f001"


@functools.cache
def recipe(seed: int) -> Recipe:
    return replace(SPACE.decode(SPACE.start), seed=seed)


def job(slot: int, cost: float = 1.0) -> Job:
    return Job(slot, recipe(slot), ITEMS, cost)


def good(done: Try, value: float = 1.0) -> Evaluation:
    return Evaluation(done.job.recipe.id, (ItemScore("first", "a", value),), {"first": value}, {})


def bad(done: Try, error: str) -> Evaluation:
    return Evaluation(done.job.recipe.id, (), {}, {}, error=error)


class Night:
    """Slots with workers at places that are named by letters, and a clock that is set by hand."""

    def __init__(self, places: str = "ab", limits: Limits | None = None) -> None:
        self.scheduler, self.now, self.count = Scheduler(limits), 1000.0, 0
        self.scheduler.expected_workers = len(places)
        self.workers = [self.add_worker(i, place) for i, place in enumerate(places)]

    def add_worker(self, name: int, place: str) -> WorkerSlot:
        self.count += 1
        found = WorkerSlot(self.count, f"w{name}", place, place)
        self.scheduler.join(found, self.now)
        return found

    def give(self, *jobs: Job) -> dict[str, Try]:
        """Worker's name -> what it was given."""
        self.scheduler.submit(jobs)
        return self.assign()

    def assign(self) -> dict[str, Try]:
        return {t.worker.name: t for t in self.scheduler.assign(self.now)}

    def finish(
        self, done: Try, found: Evaluation | None = None, seconds: float = 10.0, memory: int = 0
    ) -> None:
        self.scheduler.finished(done.number, found or good(done), self.now, seconds, memory)

    def die(self, done: Try, cause: str = "died") -> None:
        """The worker dies and is replaced at the same place."""
        self.scheduler.leave(done.worker.number, cause, f"{cause} on purpose", self.now)
        self.scheduler.forget(done.number)
        self.add_worker(int(done.worker.name[1:]), done.worker.failure_domain)

    def results(self) -> dict[int, str | None]:
        found = {job.slot: evaluation.error for job, evaluation in self.scheduler.results}
        self.scheduler.results.clear()
        return found

    def attempts(self) -> list[Attempt]:
        found, self.scheduler.attempts = self.scheduler.attempts, []
        return found
