"""Stored studies of any number of candidates, made through the store's own API without scoring a model.

A quadratic landscape takes the place of the models: a candidate's items are right by a hash of its height, so
that metrics are means of items, as a reader of the store checks. Optimization is a plain evolution strategy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore, Objective, Term
from evomerge.recipes import Recipe
from evomerge.spaces import WeightSpace
from evomerge.spaces.routes import LayerPool
from evomerge.store import (
    NewEvaluation,
    NewTrial,
    Outcome,
    ParentFacts,
    StageOutcome,
    Store,
    StudyFacts,
    TermFacts,
    Trial,
)
from evomerge.store.score_check import objective_facts
from tests.support.toy import weight_space

TASKS = ("arithmetic", "translation", "strings")
MODELS = ("math", "lang", "string")
OBJECTIVE = Objective(tuple(Term(task, subtasks=((task, 1.0),)) for task in TASKS))
ITEMS_OF_A_TASK = 12
WORKERS = (("gpu-0", "node-a"), ("gpu-1", "node-a"), ("gpu-0", "node-b"), ("gpu-1", "node-b"))
STARTED = 1_700_000_000.0
CONFIG = "study: {name}\n"


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a made-up study holds.

    Attributes:
        candidates: Number of candidates of the search.
        population: Candidates of a generation.
        name: Name of the study.
        seed: Of the landscape and of the samples.
        routes: Whether candidates are routes of layers instead of weights.
        budget: Candidates that the search may have; None for as many as it has.
    """

    candidates: int = 5000
    population: int = 25
    name: str = "large"
    seed: int = 0
    routes: bool = False
    budget: int | None = None


@dataclass(slots=True)
class StudyMaker:
    """Adds candidates to an open store, generation after generation::

    with Store.open(path, write=True) as store:
        maker = StudyMaker(store, StudyPlan(100))
        maker.begin()
        maker.add_candidates(100)
        maker.finish()
    """

    store: Store
    plan: StudyPlan
    space: WeightSpace = field(default_factory=lambda: large_space())
    made: int = 0
    _mean: list[float] = field(default_factory=list)
    _spread: float = 0.6
    _sampled: list[tuple[float, list[float], int]] = field(default_factory=list)
    _best: tuple[int, ...] = ()
    _attempts: list[Attempt] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def begin(self) -> None:
        """The study's row, parents and hand recipes."""
        self._random.seed(self.plan.seed)
        self._mean = [0.0] * len(self.space.axes)
        budget = self.plan.candidates if self.plan.budget is None else self.plan.budget
        facts = StudyFacts(
            parents={name: ParentFacts(f"/models/{name}") for name in ("base", *MODELS)},
            tasks=dict.fromkeys(TASKS, "0" * 64),
            metrics=dict.fromkeys(TASKS, "acc"),
            terms={task: TermFacts(1, True, (), ((task, 1.0),)) for task in TASKS},
            items={role: dict.fromkeys(TASKS, 500) for role in ("search", "validation", "test")},
            axes=() if self.plan.routes else tuple(axis.name for axis in self.space.axes),
            budgets=(budget,),
            base_layers=len(self.space.uniform({"weight": 1.0}).layers),
            num_workers=len(WORKERS),
            objective=objective_facts(OBJECTIVE),
            versions={"evomerge": "0.6.0"},
        )
        self.store.begin(self.plan.name, self.plan.seed, CONFIG.format(name=self.plan.name), {}, facts)
        heights = {"base": 0.2, "math": 0.42, "lang": 0.4, "string": 0.38}
        for slot, (name, height) in enumerate(heights.items()):
            skill = {"math": "arithmetic", "lang": "translation", "string": "strings"}.get(name)
            self._reference(slot, "parent", name, self._whole(name), {skill: 0.9} if skill else {}, height)
        average = self.space.uniform({"weight": 1 / len(MODELS)})
        self._reference(len(heights), "hand", "uniform average", average, {}, 0.5)
        ties = self.space.uniform({"weight": 0.7})
        self._reference(len(heights) + 1, "hand", "task arithmetic 0.7", ties, {}, 0.55)

    def add_candidates(self, count: int) -> None:
        """Samples, scores and stores candidates; a full generation moves the samples' mean to its best."""
        for _ in range(count):
            self._add_candidate()
        self._store_attempts()

    def finish(self) -> None:
        """Validation, test and the outcome."""
        trials = [trial for trial in self.store.trials() if trial.score is not None]
        own = sorted((t for t in trials if t.generation > 0), key=lambda t: -(t.score or 0.0))[:4]
        references = [trial for trial in trials if trial.generation == 0]
        rows = [self._tested(trial) for trial in own] + [self._tested(trial) for trial in references]
        best = rows[0]
        for row in rows[len(own) :]:
            lead = best["test"] - row["test"]
            row |= {"lead": lead, "lead_error": 0.02, "lead_interval": [lead - 0.04, lead + 0.04]}
        best |= {"test_interval": [best["test"] - 0.03, best["test"] + 0.03]}
        retention = [self._retention(best, row, task) for row in rows[len(own) + 1 :][:3] for task in TASKS]
        last = max(trial.generation for trial in trials)
        self.store.finish(
            Outcome(
                best=best,
                references=tuple(rows[len(own) :]),
                finalists=tuple(rows[1 : len(own)]),
                retention=tuple(retention),
                estimates={trial.id: (trial.score or 0.0, 0.01) for trial in own},
                generations=last,
                stages=(StageOutcome("routes" if self.plan.routes else "weights", 1, last, own[0].id),),
            )
        )

    # ---- parts --------------------------------------------------------------------------------------------

    def _add_candidate(self) -> None:
        generation, slot = divmod(self.made, self.plan.population)
        genome = [m + self._spread * self._random.gauss(0.0, 1.0) for m in self._mean]
        recipe = remembered(self._route(genome) if self.plan.routes else self.space.decode(genome))
        closeness = math.exp(-sum((g - 0.7) ** 2 for g in genome) / len(genome))
        fails = self.made % 97 == 96
        items = self._items("search", generation + 1)
        skills = dict(zip(TASKS, (0.95, 0.8, 0.65), strict=True))
        evaluation = self._evaluation(recipe, items, {t: s * closeness for t, s in skills.items()}, fails)
        trial = self._store_trial(
            generation + 1, slot, ("sampled", None), (tuple(genome), self._best), recipe, items, evaluation
        )
        self._attempts.append(self._attempt(trial.recipe_id, fails))
        self._sampled.append((trial.score or 0.0, genome, trial.id))
        self.made += 1
        if len(self._sampled) == self.plan.population:
            self._next_generation()

    def _store_attempts(self) -> None:
        self.store.activity.add_attempts(self._attempts)
        self._attempts = []

    def _next_generation(self) -> None:
        self._store_attempts()
        best = sorted(self._sampled, reverse=True)[: self.plan.population // 4]
        genes = list(zip(*(genome for _, genome, _ in best), strict=True))
        self._mean = [0.7 * m + 0.3 * sum(g) / len(g) for m, g in zip(self._mean, genes, strict=True)]
        self._spread = max(0.02, 0.985 * self._spread)
        self._best = tuple(trial for _, _, trial in best[:3])
        self._sampled = []

    def _reference(
        self, slot: int, origin: str, label: str, recipe: Recipe, skills: dict[str, float], height: float
    ) -> None:
        items = self._items("search", 0)
        chances = {task: skills.get(task, height) for task in TASKS}
        evaluation = self._evaluation(recipe, items, chances, False)
        self._store_trial(0, slot, (origin, label), (None, ()), recipe, items, evaluation)

    def _store_trial(
        self,
        generation: int,
        slot: int,
        named: tuple[str, str | None],
        bred: tuple[tuple[float, ...] | None, tuple[int, ...]],
        recipe: Recipe,
        items: Items,
        evaluation: Evaluation,
    ) -> Trial:
        score = OBJECTIVE.reported_score(evaluation)
        return self.store.add_trial(
            NewTrial(
                generation=generation,
                slot=slot,
                origin=named[0],
                label=named[1],
                genome=bred[0],
                parents=bred[1],
                recipe=recipe,
                items=items,
                evaluation=evaluation,
                score=score,
                reported=score,
                task_values=None if score is None else tuple(evaluation.metrics[task] for task in TASKS),
            )
        )

    def _tested(self, trial: Trial) -> dict[str, object]:
        """A line of an outcome, whose evaluations are stored."""
        line: dict[str, object] = {
            "id": trial.id,
            "origin": trial.origin,
            "label": trial.label,
            "recipe": trial.recipe_id,
            "search": trial.reported,
            "p": 0.01,
        }
        recipe = self.store.recipe(trial.recipe_id)
        for role in ("validation", "test"):
            items = self._items(role, 0)
            evaluation = self._evaluation(recipe, items, dict(trial.metrics), False)
            score = OBJECTIVE.reported_score(evaluation)
            values = tuple(evaluation.metrics[task] for task in TASKS)
            self.store.add_evaluation(
                NewEvaluation(recipe, role, items, evaluation, score, score, values)  # type: ignore[arg-type]
            )
            line |= {role: score, f"{role}_metrics": dict(evaluation.metrics)}
        return line

    @staticmethod
    def _retention(best: dict[str, object], row: dict[str, object], task: str) -> dict[str, object]:
        difference = best["test_metrics"][task] - row["test_metrics"][task]  # type: ignore[index]
        lost = difference < -0.05
        return {"task": task, "parent": row["label"], "difference": difference, "error": 0.02, "lost": lost}

    def _attempt(self, recipe_id: str, fails: bool) -> Attempt:
        worker, host = WORKERS[self.made % len(WORKERS)]
        started = STARTED + 3.0 * (self.made // len(WORKERS)) + 0.1 * (self.made % len(WORKERS))
        cause = "out of memory" if fails else "done"
        error = "CUDA out of memory" if fails else None
        seconds = 2.5 + 0.4 * self._random.random()
        return Attempt(recipe_id, 1, cause, error, worker, host, 7, "cuda:0", started, seconds, "")

    @staticmethod
    def _items(role: str, generation: int) -> Items:
        return {task: tuple(f"{role} {generation}.{i}" for i in range(ITEMS_OF_A_TASK)) for task in TASKS}

    def _evaluation(self, recipe: Recipe, items: Items, chances: dict[str, float], fails: bool) -> Evaluation:
        seconds = {"merge": 0.4, "score": 2.1}
        if fails:
            return Evaluation(recipe.id, (), {}, seconds, error="CUDA out of memory: 2 GiB asked, 1 GiB free")
        scores = tuple(
            ItemScore(task, item, float(self._random.random() < chances[task]))
            for task, ids in items.items()
            for item in ids
        )
        metrics = {
            task: math.fsum(score.value for score in scores if score.task == task) / len(ids)
            for task, ids in items.items()
        }
        layers = float(len(recipe.layers))
        return Evaluation(recipe.id, scores, metrics, seconds, costs={"layers": layers, "parameters": 1e6})

    def _whole(self, name: str) -> Recipe:
        """A parent as it is."""
        depth = len(self.space.uniform({"weight": 1.0}).layers)
        return LayerPool(((name, depth),), name).recipe([(name, i) for i in range(depth)], [1.0] * depth)

    def _route(self, genome: Sequence[float]) -> Recipe:
        depth = len(self.space.uniform({"weight": 1.0}).layers)
        pool = LayerPool(tuple((name, depth) for name in MODELS), MODELS[0])
        chosen = [(MODELS[int(3 * abs(gene)) % 3], i % depth) for i, gene in enumerate(genome[: depth + 2])]
        return pool.recipe(chosen, [1.0] * len(chosen))


class RememberedRecipe(Recipe):
    """A recipe that writes its canonical text once: the store asks for it several times."""

    def canonical(self) -> str:
        if not hasattr(self, "text"):
            object.__setattr__(self, "text", Recipe.canonical(self))
        return self.text  # type: ignore[attr-defined, no-any-return]


def remembered(recipe: Recipe) -> Recipe:
    """The same recipe."""
    return RememberedRecipe(**{f.name: getattr(recipe, f.name) for f in fields(recipe)})


def large_space() -> WeightSpace:
    """Three models of two layers, each a group."""
    return replace(weight_space(models=MODELS, groups=(1, 1)), out_dtype="bfloat16")


@contextmanager
def making(folder: Path, plan: StudyPlan) -> Iterator[StudyMaker]:
    """A study in a new folder of `folder`, begun and open for writing, as a search has it.

    Its commits are not synced to the disk: they are many, and nobody will cut the power.
    """
    path = folder / plan.name / "study.db"
    path.parent.mkdir(parents=True)
    with Store.open(path, write=True) as store:
        store._file.db.execute("PRAGMA synchronous = OFF")
        maker = StudyMaker(store, plan)
        maker.begin()
        yield maker


def make_study(folder: Path, plan: StudyPlan, state: str = "done") -> Path:
    """A whole study; its file.

    state: 'done', 'paused' or 'failed'; 'running' leaves it as a driver that is gone does.
    """
    with making(folder, plan) as maker:
        maker.add_candidates(plan.candidates)
        if state == "done":
            maker.finish()
        elif state != "running":
            maker.store.set_state(state)
    return folder / plan.name / "study.db"
