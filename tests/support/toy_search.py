"""Searches over the toy pool: plans, and runs that are broken off and resumed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import Paused
from evomerge.evaluation import Attempt, Evaluation, Items, Objective, Role, Term
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Opening, Plan, Progress, Stage, Study, one_stage
from evomerge.search.dispatch import Dispatch
from evomerge.spaces import baselines
from evomerge.store import Outcome, Store, StudyFacts
from evomerge.workers import Job
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, weight_space

SPACE = weight_space()


LABELS = (
    "base",
    "a",
    "uniform average",
    "task arithmetic 0.5",
    "task arithmetic 1",
    "TIES .5, sum",
    "a alone at 0.5",
    "DARE-TIES .5, weight 1",
)


REFERENCES = [b for b in baselines(SPACE) if b.label in LABELS]


POOLS: dict[Role, Items] = {
    "search": {"first": tuple(f"s{i}" for i in range(24)), "second": tuple(f"s{i}" for i in range(30))},
    "validation": {"first": tuple(f"v{i}" for i in range(20)), "second": tuple(f"v{i}" for i in range(20))},
    "test": {"first": tuple(f"t{i}" for i in range(20)), "second": tuple(f"t{i}" for i in range(20))},
}


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "space": SPACE,
        "baselines": REFERENCES,
        "objective": Objective((Term("first"), Term("second", 2.0))),
        "optimizer": lambda start: CmaEs(start, 0.15, population=6, seed=5),
        "items": POOLS,
        "per_generation": 8,
        "evaluations": 18,
        "finalists": 3,
        "start_at_best": False,
        "seed": 5,
    }
    given |= changes
    stage = one_stage(*(given.pop(name) for name in ("space", "optimizer", "evaluations", "start_at_best")))
    return Plan(**{"stages": stage, **given})


def search(
    file: Path,
    pool: ToyPool,
    of: Plan | None = None,
    seen: Callable[[Study, Progress], None] = lambda study, progress: None,
) -> Outcome:
    """One process' life: opens the store, begins or resumes, runs to its end or its interruption."""
    file.parent.mkdir(exist_ok=True)
    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        study = Study(of or plan(), store, pool)
        study.show = lambda progress: seen(study, progress)
        return study.run()


class Killed(BaseException):
    """Stands for the end of the process."""


def broken(
    file: Path,
    at: Sequence[int],
    how: str,
    of: Plan | None = None,
    fails: Callable[[Recipe], bool] = lambda recipe: False,
) -> list[ToyPool]:
    """Runs a search to its end through interruptions, each at that evaluation of its own process.

    how: 'stop' asks it to end, 'kill' ends it after the evaluation was stored, 'lost' before.
    """
    pools = []
    for k in [*at, None]:
        study: list[Study] = []

        def stop(made: int, k: int | None = k, study: list[Study] = study) -> None:
            if made == k:
                study[0].dispatch.request_stop()

        def kill(made: int, k: int | None = k) -> None:
            if made == k:
                raise Killed

        pool = ToyPool(
            fails, **{"stop": {"before": stop}, "kill": {"after": kill}, "lost": {"before": kill}}[how]
        )
        pools.append(pool)
        file.parent.mkdir(exist_ok=True)
        with Store.open(file, write=True) as store:
            if store.study() is None:
                store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
            study.append(Study(of or plan(), store, pool))
            try:
                study[0].run()
            except Killed:
                continue
            except Paused:
                assert store.study().state == "paused"  # type: ignore[union-attr]
    return pools


def sometimes(recipe: Recipe) -> bool:
    """One recipe in five."""
    return uniform("fails", recipe.id) < 0.2


def own(recipe: Recipe) -> bool:
    """A recipe of the search, not of the references."""
    return recipe.id not in {b.recipe.id for b in REFERENCES}


def islands(count: int, evaluations: int = 36, **changes: Any) -> Plan:
    """A plan with islands that have seeds of their own."""

    def optimizer(start: Sequence[float], island: int) -> CmaEs:
        return CmaEs(start, 0.15, population=6, seed=5 + island)

    stage = Stage("weights", evaluations, lambda start: Opening(SPACE, optimizer))
    given = plan(**changes)
    return Plan(
        **{f: getattr(given, f) for f in given.__dataclass_fields__} | {"stages": (stage,), "islands": count}
    )


class Crew:
    """As many workers as `size`, of which any may be the next to finish; `choose` says which of those in
    flight.

    begun, ended: recipe and items of every job in these states. seconds: of each attempt.
    """

    def __init__(
        self,
        size: int,
        choose: Callable[[list[Job]], int],
        fails: Callable[[Recipe], bool] = lambda recipe: False,
        after: Callable[[int], None] = lambda made: None,
        seconds: float = 1.0,
    ) -> None:
        self._size, self._choose, self._toy, self._after, self._seconds = (
            size,
            choose,
            ToyPool(fails),
            after,
            seconds,
        )
        self._queue: list[Job] = []
        self.flying: list[Job] = []
        self.begun: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self._attempts: list[Attempt] = []

    def submit(self, jobs: Sequence[Job]) -> None:
        self._queue.extend(jobs)
        self._begin()

    def _begin(self) -> None:
        while self._queue and len(self.flying) < self._size:
            self.flying.append(self._queue.pop(0))
            self.begun.append((self.flying[-1].recipe.id, str(self.flying[-1].items)))

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        if not self.flying:
            return None
        job = self.flying.pop(self._choose(self.flying))
        self._begin()
        self._attempts.append(Attempt(job.recipe.id, 1, "done", None, "w", "host", 1, "", 0.0, self._seconds))
        self.ended.append((job.recipe.id, str(job.items)))
        return job, self._toy.evaluate(job.recipe, job.items)

    def drain(self) -> None:
        self._queue.clear()

    @property
    def out(self) -> int:
        return len(self.flying) + len(self._queue)

    def attempts(self) -> list[Attempt]:
        found, self._attempts = self._attempts, []
        if found:
            self._after(len(self.ended))
        return found

    def close(self) -> None:
        self._queue.clear()


def shuffled(seed: int) -> Callable[[list[Job]], int]:
    generator = random.Random(seed)
    return lambda flying: generator.randrange(len(flying))


def run(file: Path, of: Plan, pool: Any, **dispatch: Any) -> Outcome:
    file.parent.mkdir(exist_ok=True)
    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        return Study(of, store, pool, dispatch=Dispatch(pool, store, **dispatch)).run()


def pipelined(
    islands: int = 1,
    evaluations: int = 36,
    make: Callable[[Sequence[float], int], Any] | None = None,
    **changes: Any,
) -> Plan:
    """A plan of that kind, with islands that have seeds of their own."""

    def optimizer(start: Sequence[float], island: int) -> Any:
        return CmaEs(start, 0.15, population=6, seed=5 + island)

    stage = Stage("weights", evaluations, lambda start: Opening(SPACE, make or optimizer))
    given = plan(**changes)
    return Plan(
        **{f: getattr(given, f) for f in given.__dataclass_fields__}
        | {"stages": (stage,), "islands": islands, "pipelined": True}
    )


class SoftPool(ToyPool):
    """As the toy pool, with soft scores: probabilities about the recipe's height that tell more than one
    right answer does."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        found = super().evaluate(recipe, items)
        mean = math.fsum(s.value for s in found.items) / max(1, len(found.items))
        scores = tuple(
            replace(
                s,
                probability=(p := 0.5 * s.value + 0.5 * uniform("soft", recipe.id, s.task, s.item)),
                logprob=math.log(p + 1e-9) + mean * 0,
            )
            for s in found.items
        )
        soft = {}
        for task, ids in items.items() if scores else ():
            soft[f"{task}:probability"] = math.fsum(
                s.probability or 0.0 for s in scores if s.task == task
            ) / len(ids)
            soft[f"{task}:logprob"] = math.fsum(s.logprob or 0.0 for s in scores if s.task == task) / len(ids)
        return replace(found, items=scores, metrics={**found.metrics, **soft})
