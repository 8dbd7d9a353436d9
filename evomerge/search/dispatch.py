"""Between the loop and a pool: hands candidates over, gives their results back, keeps the attempts, and knows when to end.

Several searches run side by side as generators: each yields the jobs it waits for and is sent their results, one at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from evomerge.errors import Paused, Stopped
from evomerge.evaluation import Evaluation
from evomerge.store import Store, stop_request
from evomerge.workers import Job, Pool

Result = tuple[Job, Evaluation]
T = TypeVar("T")
Task = Generator[Sequence[Job], Result, T]
"""Yields jobs to begin, perhaps none; is sent one result at a time; returns when it waits for no more."""
_TICK = 1.0  # seconds between two looks at signals and clocks


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may use up, beside evaluations; None is no limit. hours: of the driver, over all its runs; gpu_hours: of
    workers at work, times `gpus` of each (1 for a worker without a GPU); cost: gpu_hours times `price`."""

    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    price: float = 0.0
    gpus: float = 1.0


class Dispatch:
    """One pool, one store. stop: 0 goes on, 1 lets what is in flight end within `grace` seconds and stores it, 2 drops it.
    A stop that another process asks for, see `evomerge.store.paths`, is 1."""

    def __init__(
        self,
        pool: Pool,
        store: Store,
        *,
        grace: float = 600.0,
        budget: Budget | None = None,
        backup: float | None = None,
    ) -> None:
        """backup: minutes between two copies of the store; None makes none."""
        self.pool, self.store, self.grace, self.budget, self.backup = (
            pool,
            store,
            grace,
            budget or Budget(),
            backup,
        )
        self.stop = 0
        self._why: Paused = Paused("stopped by a signal; run the same command with --resume to go on")
        self._count, self._deadline, self._seen = 0, 0.0, time.monotonic()

    def each(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """The results of jobs, as they come. Raises Paused once `stop` is set and nothing that may be waited for is in flight."""
        own = self._numbered(jobs)
        self._submit(list(own.values()))
        for _ in jobs:
            job, evaluation = self._next()
            yield jobs[job.slot - min(own)], evaluation
            self._note()

    def together(self, tasks: Sequence[Task[T]]) -> list[T]:
        """Runs tasks side by side to their ends; what each returned. Raises what `each` raises.

        What several of them wait for, the same recipe on the same items, is evaluated once."""
        ends: dict[int, T] = {}
        flying: dict[Hashable, list[tuple[int, Job]]] = {}  # what is out -> who waits for it
        keys: dict[int, Hashable] = {}

        def step(number: int, result: Result | None) -> None:
            try:
                jobs = next(tasks[number]) if result is None else tasks[number].send(result)
            except StopIteration as end:
                ends[number] = end.value
                return
            fresh = []
            for job in jobs:
                key = (job.recipe.id, tuple((task, tuple(ids)) for task, ids in sorted(job.items.items())))
                if key not in flying:
                    fresh.append((key, job))
                flying.setdefault(key, []).append((number, job))
            numbered = self._numbered([job for _, job in fresh])
            keys.update({slot: key for slot, (key, _) in zip(numbered, fresh, strict=True)})
            self._submit(list(numbered.values()))

        for number in range(len(tasks)):
            step(number, None)
        while len(ends) < len(tasks):
            job, evaluation = self._next()
            for number, own in flying.pop(keys.pop(job.slot)):
                step(number, (own, evaluation))
            self._note()
        return [ends[number] for number in range(len(tasks))]

    def spent(self) -> str | None:
        """Which budget is used up, in words; None while there is something left of each."""
        asked = self.budget
        self._note()
        hours = self.store.activity.driven_seconds() / 3600
        if asked.hours is not None and hours >= asked.hours:
            return f"the budget of {asked.hours:g} hours is used up"
        used = self.store.activity.busy_seconds() / 3600 * asked.gpus
        if asked.gpu_hours is not None and used >= asked.gpu_hours:
            return f"the budget of {asked.gpu_hours:g} GPU hours is used up"
        if asked.cost is not None and used * asked.price >= asked.cost:
            return f"the budget of {asked.cost:g} is used up: {used:.2f} GPU hours at {asked.price:g}"
        return None

    def _numbered(self, jobs: Sequence[Job]) -> dict[int, Job]:
        numbered = {self._count + i: replace(job, slot=self._count + i) for i, job in enumerate(jobs)}
        self._count += len(jobs)
        return numbered

    def _submit(self, jobs: Sequence[Job]) -> None:
        if jobs and not self.stop:
            self.pool.submit(jobs)

    def _next(self) -> Result:
        """The pool's next result; draining the pool once `stop` is set."""
        while True:
            if self.stop:
                self._drain()
            found = self.pool.result(_TICK)
            if found is not None:
                return found
            if not self.stop and not self.pool.out:
                raise AssertionError("results are waited for, and the pool has nothing out")
            self._note()

    def _drain(self) -> None:
        if not self._deadline:
            self.pool.drain()
            self._deadline = time.monotonic() + self.grace
        if self.stop > 1 or not self.pool.out or time.monotonic() > self._deadline:
            self._note()
            raise self._why

    def _note(self) -> None:
        """Stores what attempts ended and, once a second, how long the driver has run; looks whether it is asked to stop."""
        if ended := self.pool.attempts():
            self.store.activity.add_attempts(ended)
        now = time.monotonic()
        if now - self._seen >= _TICK:
            self.store.activity.add_driven_seconds(now - self._seen)
            self._seen = now
            if not self.stop and stop_request.stop_requested(self.store.path.parent):
                self.stop, self._why = 1, Stopped("stopped by evomerge stop; resume goes on")
            if self.backup is not None:
                self.store.backup_every(self.backup)


class Line(Generic[T]):
    """Tasks of one search that are under way together and end in the order they were begun: a task may be begun before the
    last result of the one before it is there."""

    def __init__(self) -> None:
        self._tasks: deque[Task[T]] = deque()
        self._ends: dict[Task[T], T] = {}
        self._owners: dict[int, tuple[Task[T], Job]] = {}  # by the job's identity: slots are each task's own
        self._jobs: list[Job] = []  # not handed over yet

    def begin(self, task: Task[T]) -> None:
        """Its jobs are handed over with the next `first`."""
        self._tasks.append(task)
        self._step(task, None)

    def first(self) -> Task[T]:
        """What the oldest task returns; the others go on meanwhile."""
        while self._tasks[0] not in self._ends:
            jobs, self._jobs = self._jobs, []
            job, evaluation = yield jobs
            task, own = self._owners.pop(id(job))
            self._step(task, (own, evaluation))
        return self._ends.pop(self._tasks.popleft())

    def _step(self, task: Task[T], result: Result | None) -> None:
        try:
            jobs = next(task) if result is None else task.send(result)
        except StopIteration as end:
            self._ends[task] = end.value
            return
        self._owners.update({id(job): (task, job) for job in jobs})
        self._jobs += jobs
