"""Seeded studies on a landscape whose truth is known: does the test interval cover it, how far off are the
search scores?

Every study is a whole one: Study, Store, CmaEs, parents and hand recipes, finalists on validation, the winner
on test. Only the models are not: a recipe answers an item of a task with a known probability, by the item's
own difficulty (70 % of items, the same for all recipes) or by itself (30 %), so that the truth of a recipe,
its expected score over the population of items, is known exactly. Each study draws its items afresh.

usage: python scripts/validation/interval_coverage.py [--studies 400] [--out results/coverage.md]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Term
from evomerge.evaluation.estimates import Estimate, stratified
from evomerge.methods import method
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Mix, Recipe, Setting
from evomerge.search import Plan, Study, one_stage
from evomerge.search.racing import Race
from evomerge.spaces import Range, WeightSpace, baselines
from evomerge.store import Store, StudyFacts
from evomerge.workers import InProcessPool
from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"search": 400, "validation": 200, "test": 500}  # items of each task
PER_GENERATION, POPULATION, GENERATIONS, FINALISTS, SHARED = 50, 12, 8, 6, 0.7
WEIGHTS = {"easy": 2.0, "hard": 1.0}  # of the objective
GOALS = {"a": (0.9, 0.7, 0.5), "b": (0.4, 0.5, 0.6)}  # weight of each layer at the top of the landscape


@dataclass(frozen=True, slots=True)
class Outcome:
    """One study: the winner's truth and estimates; best: (highest search score of a sampled candidate, that
    one's truth).
    """

    truth: float
    test: Estimate
    search: float
    validation: float
    origin: str
    best: tuple[float, float]
    items: int


def truths(recipe: Recipe) -> dict[str, float]:
    """Task -> probability that a recipe answers an item of it correctly."""
    error = 0.0
    for i, mix in enumerate(recipe.layers):
        found = _weights(mix)
        error += sum((found[name] - goals[i]) ** 2 for name, goals in GOALS.items())
    height = math.exp(-error / len(recipe.layers))
    return at(height)


def at(height: float) -> dict[str, float]:
    """Task -> probability of a correct answer at a height of the landscape in (0, 1]."""
    return {"easy": 0.35 + 0.5 * height, "hard": 0.1 + 0.5 * height**2}


def truth(recipe: Recipe) -> float:
    """The recipe's expected objective."""
    return _objective(truths(recipe))


def _objective(scores: dict[str, float]) -> float:
    return sum(WEIGHTS[t] * p for t, p in scores.items()) / sum(WEIGHTS.values())


def _weights(mix: Mix) -> dict[str, float]:
    """How much of each model a mix takes."""
    own, found = dict(mix.params).get("weight"), dict.fromkeys(GOALS, 0.0)
    for i, (name, _) in enumerate(mix.sources):
        if name in found:
            found[name] = _mean(own[i]) if isinstance(own, tuple) else 1.0
    return found


def _mean(setting: Setting) -> float:
    cases = [setting] if isinstance(setting, int | float) else [number for _, number in setting.cases]
    return float(np.mean(cases))


class Landscape:
    """A pool that answers items as `truths` says; an item's id ends with its number."""

    def __init__(self, seed: int) -> None:
        self.seed, self.items = seed, 0
        self._shared = {task: self._uniform(task, "items") for task in WEIGHTS}
        self._by_item = {task: self._uniform(task, "kind") < SHARED for task in WEIGHTS}

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Each item is right with its task's probability."""
        scores = []
        for task, p in truths(recipe).items():
            ids = items.get(task, ())
            numbers = [int(item.rpartition("-")[2]) for item in ids]
            u = np.where(self._by_item[task], self._shared[task], self._uniform(task, recipe.id))[numbers]
            scores += [ItemScore(task, item, float(right)) for item, right in zip(ids, u < p, strict=True)]
        self.items += len(scores)
        metrics = {
            task: float(np.mean([s.value for s in scores if s.task == task]))
            for task, ids in items.items()
            if ids
        }
        return Evaluation(recipe.id, tuple(scores), metrics, {"score": 0.0})

    def _uniform(self, task: str, key: str) -> np.ndarray:
        """[all items of a task] numbers in [0, 1) that depend on study, task and key alone."""
        digest = hashlib.sha256(f"{self.seed}/{task}/{key}".encode()).digest()
        return np.random.default_rng(list(digest)).random(sum(SIZES.values()))


def items(seed: int) -> dict[str, Items]:
    """Role -> task -> ids, fresh for every seed."""
    ends = np.cumsum([0, *SIZES.values()])
    spans = dict(zip(SIZES, itertools.pairwise(ends), strict=True))
    return {
        role: {task: tuple(f"{seed}-{task}-{i}" for i in range(a, b)) for task in WEIGHTS}
        for role, (a, b) in spans.items()
    }


def plan(seed: int, race: Race | None = None) -> Plan:
    """A search of the landscape, the optimizer and the items of its own."""
    space = WeightSpace(
        method=method("task_arithmetic"),
        base="base",
        models=tuple(GOALS),
        groups=(2, 1),
        components=("attention", "mlp"),
        segments=((".self_attn.", "attention"), (".mlp.", "mlp")),
        ranges={"weight": Range(-0.5, 2.0, 0.3)},
    )
    return Plan(
        baselines=baselines(space),
        objective=Objective(tuple(Term(task, weight) for task, weight in WEIGHTS.items())),
        stages=one_stage(
            space,
            lambda start: CmaEs(start, 0.2, population=POPULATION, diagonal=True, seed=seed),
            GENERATIONS * POPULATION,
        ),
        items=items(seed),
        per_generation=PER_GENERATION,
        finalists=FINALISTS,
        seed=seed,
        race=race,
    )


def study(seed: int, folder: Path) -> Outcome:
    """Runs one study from its beginning to its test."""
    search = plan(seed)
    pool = Landscape(seed)
    with Store.open(folder / f"{seed}.db", write=True) as store:
        store.begin("coverage", seed, "", {}, StudyFacts())
        outcome = Study(search, store, InProcessPool(pool)).run().best
        recipe = store.recipe(outcome["recipe"])
        tested = store.evaluation(recipe.id, "test", search.items["test"])
        assert tested is not None
        sampled = [t for t in store.trials() if t.origin == "sampled" and t.score is not None]
        best = max(sampled, key=lambda t: t.score)
        found = (float(best.score), truth(store.recipe(best.recipe_id)))
    test = stratified(tested.evaluation.items, WEIGHTS)
    return Outcome(
        truth(recipe),
        test,
        float(outcome["search"]),
        float(outcome["validation"]),
        outcome["origin"],
        found,
        pool.items,
    )


def run(studies: int) -> list[Outcome]:
    """Studies with the seeds 0, 1, ..."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        return [study(seed, Path(folder)) for seed in range(studies)]


def covered(outcomes: Sequence[Outcome], level: float = 0.95) -> list[bool]:
    """Whether each study's test interval holds the truth."""
    intervals = [o.test.interval(level) for o in outcomes]
    return [low <= o.truth <= high for o, (low, high) in zip(outcomes, intervals, strict=True)]


def report(outcomes: Sequence[Outcome], seconds: float) -> list[str]:
    rows = [
        "| level | intervals that hold the truth | share | 95 % interval of the share (Clopper–Pearson) | "
        "mean half width |",
        "| --- " * 5 + "|",
    ]
    for level in (0.5, 0.8, 0.9, 0.95, 0.99):
        held = covered(outcomes, level)
        exact = binomtest(sum(held), len(held)).proportion_ci(0.95)
        half = np.mean([(o.test.interval(level)[1] - o.test.interval(level)[0]) / 2 for o in outcomes])
        rows.append(
            f"| {level:.0%} | {sum(held)} of {len(held)} | **{np.mean(held):.3f}** | {exact.low:.3f} to "
            f"{exact.high:.3f} | {half:.4f} |"
        )
    rows += [
        "",
        "| score less truth | mean ± s.e. | standard deviation | largest |",
        "| --- | --- | --- | --- |",
    ]
    gaps = {
        "best search score of a study, its own truth": [o.best[0] - o.best[1] for o in outcomes],
        "the winner's search score": [o.search - o.truth for o in outcomes],
        "the same, winner the distribution's mean": [
            o.search - o.truth for o in outcomes if o.origin == "mean"
        ],
        "the same, winner a sampled candidate": [
            o.search - o.truth for o in outcomes if o.origin == "sampled"
        ],
        "the winner's validation score": [o.validation - o.truth for o in outcomes],
        "the winner's test score": [o.test.mean - o.truth for o in outcomes],
    }
    for name, gap in gaps.items():
        if len(gap) > 1:
            d = np.array(gap)
            rows.append(
                f"| {name} ({len(d)}) | {d.mean():+.4f} ± {d.std(ddof=1) / math.sqrt(len(d)):.4f} | "
                f"{d.std(ddof=1):.4f} | {d.max():+.3f} |"
            )
    error = np.mean([o.test.error for o in outcomes]) / np.std([o.test.mean - o.truth for o in outcomes])
    return [
        *rows, "",
        f"Stated standard error of the test score over the one found: {error:.3f}. The winners' truth: "
        f"{np.mean([o.truth for o in outcomes]):.3f} "
        f"on average, {_objective(at(1.0)):.3f} at the top of the landscape. "
        f"{np.mean([o.items for o in outcomes]):.0f} item evaluations a study; "
        f"{seconds:.0f} s for all.",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--out", default=str(REPOSITORY / "results" / "coverage.md"))
    args = parser.parse_args()
    started = time.monotonic()
    outcomes = run(args.studies)
    seconds = time.monotonic() - started
    weights = " and ".join(f"'{task}' (weight {w:g})" for task, w in WEIGHTS.items())
    sizes = ", ".join(f"{n} for {role}" for role, n in SIZES.items())
    head = [
        "# Coverage of the test interval, optimism of the search scores",
        "",
        f"Written by `python scripts/validation/interval_coverage.py --studies {args.studies}`: whole "
        f"studies, seeds 0 to {args.studies - 1}, {GENERATIONS} generations",
        f"of {POPULATION} candidates each, on a landscape whose truth is known: tasks {weights}; items "
        "drawn afresh for",
        f"each study, {sizes} of each task; {PER_GENERATION} of each task a generation. The truth",
        "of a recipe is its expected score over the population of items. The interval is the one that a "
        "report prints,",
        "`statistics.stratified(test items, weights).interval()`.",
        "",
        f"{machine.stamp('numpy', 'scipy', 'cma')}.",
        "",
    ]
    Path(args.out).write_text("\n".join(head + report(outcomes, seconds)) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
