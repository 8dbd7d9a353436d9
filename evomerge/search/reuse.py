"""What earlier studies know: evaluations that need not be made again, and a pool that answers from them.

An evaluation is known by its recipe, the content of the models that the recipe reads, the tasks' own hashes
(settings, code, prompts and which items are of which role), and how scores are computed (versions, threads,
types, device). Whatever differs in one of these is evaluated anew. Writes nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore, mean_metrics, task_of_metric
from evomerge.recipes import Recipe
from evomerge.store import Purpose, Store, StudyFacts, study_facts
from evomerge.workers import Job, Pool

log = logging.getLogger(__name__)
REUSED = "reused"
"""The stage, of 0 seconds, that an evaluation of another study is marked with."""
_PURPOSES: tuple[Purpose, ...] = ("search", "rung", "validation", "test")


@dataclass(frozen=True, slots=True)
class _Known:
    """An earlier study that can be asked.

    Attributes:
        name: Its name.
        store: Its store, open for reading.
        parents: Model -> content hash.
        terms: Those of its tasks and groups that are the same now.
    """

    name: str
    store: Store
    parents: Mapping[str, str]
    terms: frozenset[str]


class Earlier:
    """Stores of earlier studies, open for reading. A context manager that closes them.

    Attributes:
        refused: Which studies cannot be asked, and why.
    """

    def __init__(self, paths: Sequence[Path], facts: StudyFacts, *, parts: bool = False) -> None:
        """Opens the stores.

        An evaluation on exactly the items asked is what scoring them again would give, to the bit. Put
        together from other sets it may differ in a last bit, for batches were others; then ranks that depend
        on one may differ too.

        Args:
            paths: Database files of earlier studies.
            facts: Facts of the study that asks, see `evomerge.launch.prepare`.
            parts: Whether to answer also with items that were scored in other sets.

        Raises:
            StudyError: For a file that is missing or damaged.
        """
        self.refused: list[str] = []
        self._parts, self._facts = parts, facts
        self._parents = {name: fact.sha256 for name, fact in facts.parents.items()}
        self._leaves = {
            term: tuple(leaf for leaf, _ in term_facts.subtasks) for term, term_facts in facts.terms.items()
        }
        self._known: list[_Known] = []
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Earlier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the stores."""
        while self._known:
            self._known.pop().store.close()

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of the studies that are asked, in that order."""
        return tuple(one.name for one in self._known)

    def lookup(self, recipe: Recipe, items: Items) -> Evaluation | None:
        """Looks an evaluation up; the first study that knows it answers.

        Args:
            recipe: What was evaluated.
            items: The items that it is asked for.

        Returns:
            An evaluation that succeeded, or None where no study knows one.
        """
        tasks = [task for task, ids in items.items() if ids]
        asked: list[_Known] = []
        for one in list(self._known):
            if not tasks or not self._same_parents(one, recipe):
                continue
            try:
                if self._covers(one, tasks) and (found := self._whole(one, recipe, items)):
                    return found
                asked.append(one)
            except StudyError as error:  # others know what is lost, or it is scored anew: the search goes on
                log.warning("study '%s' is not asked any more: %s", one.name, error)
                self._known.remove(one)
                one.store.close()
        return self._together(asked, recipe, items) if self._parts else None

    def _open(self, path: Path) -> None:
        store = Store.open(path)
        try:
            study = store.study()
            why = "it holds no study yet" if study is None else _differs(study.facts, self._facts)
        except BaseException:
            store.close()
            raise
        if study is None or why:
            self.refused.append(f"nothing is reused of {study.name if study else path}: {why}")
            store.close()
            return
        terms = frozenset(term for term in self._leaves if _same_term(term, study.facts, self._facts))
        if not terms:
            self.refused.append(
                f"nothing is reused of {study.name}: none of its tasks is one of this study, with the same "
                "items and prompts"
            )
            store.close()
            return
        parents = {name: fact.sha256 for name, fact in study.facts.parents.items()}
        self._known.append(_Known(study.name, store, parents, terms))

    def _same_parents(self, one: _Known, recipe: Recipe) -> bool:
        return all(
            model in self._parents and one.parents.get(model) == self._parents[model]
            for model in recipe.models
        )

    def _covers(self, one: _Known, tasks: Sequence[str]) -> bool:
        return set(tasks) <= {leaf for term in one.terms for leaf in self._leaves[term]}

    def _whole(self, one: _Known, recipe: Recipe, items: Items) -> Evaluation | None:
        """A stored evaluation on exactly these items, with the metrics that this study has names for.

        What an item is scored by depends on its role, and roles are part of a task's hash: they are the same
        in both.
        """
        for purpose in _PURPOSES:
            found = one.store.evaluation(recipe.id, purpose, items)
            if found is not None and found.evaluation.error is None:
                names = {task for task, ids in items.items() if ids} | {
                    t for t, own in self._leaves.items() if set(own) <= set(items)
                }
                metrics = {
                    name: value
                    for name, value in found.evaluation.metrics.items()
                    if task_of_metric(name) in names
                }
                return replace(found.evaluation, metrics=metrics, seconds={REUSED: 0.0})
        return None

    def _together(self, asked: Sequence[_Known], recipe: Recipe, items: Items) -> Evaluation | None:
        """The items' scores from whatever sets they were scored in.

        None where one is unknown, or a metric is no mean of items.
        """
        means = {
            term
            for term, term_facts in self._facts.terms.items()
            if term_facts.mean and self._leaves[term] == (term,)
        }
        if not {task for task, ids in items.items() if ids} <= means:
            return None
        known: dict[tuple[str, str], ItemScore] = {}
        costs: Mapping[str, float] = {}
        for one in asked:
            for _, scored in one.store.evaluations(recipe.id):
                if scored.evaluation.error is None:
                    costs = costs or scored.evaluation.costs
                    for score in scored.evaluation.items:
                        if score.task in one.terms:
                            known.setdefault((score.task, score.item), score)
        wanted = [(task, item) for task, ids in items.items() for item in ids]
        if any(key not in known for key in wanted):
            return None
        metrics: dict[str, float] = {}
        for task in (task for task, ids in items.items() if ids):
            metrics |= mean_metrics(task, [known[task, item] for item in items[task]])
        return Evaluation(recipe.id, tuple(known[key] for key in wanted), metrics, {REUSED: 0.0}, costs=costs)


class KnownPool:
    """A pool before which earlier studies are asked. Satisfies `evomerge.workers.pool.Pool`.

    Attributes:
        pool: What evaluates the jobs that no study knows.
        earlier: The studies that are asked.
        hits: Number of jobs that they answered.
    """

    def __init__(self, pool: Pool, earlier: Earlier) -> None:
        """Takes a pool and the studies; `close` closes both.

        Args:
            pool: What evaluates the jobs that no study knows.
            earlier: The studies that are asked.
        """
        self.pool, self.earlier, self.hits = pool, earlier, 0
        self._answered: deque[tuple[Job, Evaluation]] = deque()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Finishes jobs whose evaluation is known at once and hands the others on together.

        Args:
            jobs: What to evaluate.
        """
        others: list[Job] = []
        for job in jobs:
            found = self.earlier.lookup(job.recipe, job.items) if job.is_plain else None
            if found is None:
                others.append(job)
            else:
                self._answered.append((job, found))
                self.hits += 1
        if others:
            self.pool.submit(others)

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """Takes a finished job; those whose evaluation was known come first.

        Args:
            timeout: Seconds to wait for one; None waits without end.

        Returns:
            A job and its evaluation; None where none ended in time.
        """
        return self._answered.popleft() if self._answered else self.pool.result(timeout)

    def drain(self) -> None:
        """What is known still comes."""
        self.pool.drain()

    @property
    def out(self) -> int:
        """How many results will still come."""
        return len(self._answered) + self.pool.out

    def attempts(self) -> list[Attempt]:
        """Those of the pool: reading is no try."""
        return self.pool.attempts()

    def close(self) -> None:
        """Lets go of the pool and of the stores."""
        self.pool.close()
        self.earlier.close()


def _differs(before: StudyFacts, now: StudyFacts) -> str:
    """Why nothing that was scored then can stand for a score of now; empty where it can."""
    needed = {
        "versions": before.versions,
        "threads": before.threads,
        "scoring": before.scoring,
        "parents": before.parents,
        "terms": before.terms,
        "tasks": before.tasks,
    }
    for name, value in needed.items():
        if not value:
            return f"it was begun with an evomerge that did not store its {name}"
    return next(iter(study_facts.differences(_scoring_policy(before), _scoring_policy(now))), "")


def _scoring_policy(facts: StudyFacts) -> dict[str, Any]:
    """The facts that must agree whatever is scored."""
    return {
        "versions": study_facts.comparable_versions(facts.versions),
        "threads": facts.threads,
        "gate": facts.max_nats_per_token,
        "scoring": dict(facts.scoring),
    }


def _same_term(term: str, before: StudyFacts, now: StudyFacts) -> bool:
    """Whether a task or group is the same: its hash, what its metric is, and what scores its subtasks."""
    if term not in before.tasks or term not in before.terms:
        return False
    if before.tasks[term] != now.tasks.get(term) or before.terms[term] != now.terms[term]:
        return False
    subtasks = [name for name, _ in now.terms[term].subtasks]
    if before.sources.get(term) != now.sources.get(term):
        return False
    return all(before.backends.get(name) == now.backends.get(name) for name in subtasks)
