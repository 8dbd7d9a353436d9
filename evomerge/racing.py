"""A generation's race: all candidates on few items first, on more only while they may be among its best.

Rungs are nested parts of the generation's items. After each rung but the last, a candidate whose paired difference to the
mu-th best is significantly below 0 is dropped. The probability that any of the mu candidates that would be best on all the
items is dropped is at most `error` a generation (Bonferroni over rungs and candidates; measured in results/racing.md).
Of the dropped, an optimizer learns how far they came and, of those that came as far, their order on the items they had.
Knows nothing of stores, pools or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import ConfigError
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective
from evomerge.recipe import Recipe
from evomerge.statistics import race_level, race_step

Score = Callable[[Sequence[Recipe], Items], Mapping[str, Evaluation]]
"""Scores recipes on items: recipe id -> evaluation."""


@dataclass(frozen=True, slots=True)
class Race:
    """rungs: shares of the items, in (0, 1], increasing, the last 1. error: see the module, in (0, 1)."""

    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)
    error: float = 0.05

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip((0.0, *self.rungs), self.rungs, strict=False))
        if not self.rungs or not increasing or self.rungs[-1] != 1.0:
            raise ConfigError(f"the rungs of a race are increasing shares of the items that end with 1, got {list(self.rungs)}")
        if not 0.0 < self.error < 1.0:
            raise ConfigError(f"the error rate of a race must be in (0, 1), got {self.error:g}")


@dataclass(frozen=True, slots=True)
class Raced:
    """How a candidate fared. items: those it was scored on; dropped: the rung, from 1, after which it was dropped."""

    evaluation: Evaluation
    items: Items
    dropped: int | None


def check(objective: Objective) -> None:
    """Raises ConfigError where an objective cannot be raced: paired tests need a mean of item values."""
    if objective.kind != "mean":
        raise ConfigError(f"a race compares means of items, and a '{objective.kind}' objective is none; choose 'mean', or leave out search.race")
    if objective.keep:
        raise ConfigError("a race drops candidates by their score alone and would pass over 'keep'; leave out one of the two")
    for term in objective.terms:
        if not term.mean:
            raise ConfigError(f"a race compares means of items, and the metric of task '{term.task}' is aggregated otherwise; leave out search.race")


def run(candidates: Mapping[int, Recipe], items: Items, race: Race, objective: Objective, mu: int, score: Score) -> dict[int, Raced]:
    """Races the candidates of a generation; slot -> how each fared. mu: how many of the best the optimizer learns from.

    Deterministic: the same item scores give the same race. One that fails, or has a value that is not finite, is out of it.
    """
    parts = increments(items, race.rungs)
    alpha = race_level(race.error, len(parts), len(candidates))
    own: dict[int, list[Evaluation]] = {slot: [] for slot in candidates}
    out: dict[int, Raced] = {}
    alive = list(candidates)

    def end(slot: int, rung: int, dropped: int | None) -> None:
        done = together(items, parts[:rung])
        out[slot] = Raced(union(own[slot], done, objective), done, dropped)

    for rung, part in enumerate(parts, start=1):
        scored = score([candidates[slot] for slot in alive], part)
        for slot in alive:
            own[slot].append(scored[candidates[slot].id])
        failed = [slot for slot in alive if not _usable(own[slot][-1], objective)]
        alive = [slot for slot in alive if slot not in failed]
        for slot in failed:
            end(slot, rung, None)
        if rung < len(parts) and alive:
            kept = _step({slot: own[slot] for slot in alive}, items, objective, mu, alpha)
            for slot in alive:
                if slot not in kept:
                    end(slot, rung, rung)
            alive = kept
    for slot in alive:
        end(slot, len(parts), None)
    return {slot: out[slot] for slot in candidates}


def increments(items: Items, rungs: Sequence[float]) -> list[Items]:
    """What each rung adds: of every task the next ids, so that a share of them, rounded up, has been scored after it.

    The first rung has two items of a task at least, or a paired test could not be made; rungs that add nothing are left out.
    """
    ends = [{task: min(len(ids), max(2, math.ceil(share * len(ids) - 1e-9))) for task, ids in items.items()} for share in rungs]
    starts = [dict.fromkeys(items, 0), *ends[:-1]]
    parts = [{task: tuple(ids[a[task] : b[task]]) for task, ids in items.items() if a[task] < b[task]} for a, b in zip(starts, ends, strict=True)]
    return [part for part in parts if part]


def together(items: Items, parts: Sequence[Items]) -> Items:
    """The items of several rungs as one set, in the order of the generation's."""
    return {task: tuple(item for part in parts for item in part.get(task, ())) for task in items}


def union(evaluations: Sequence[Evaluation], items: Items, objective: Objective) -> Evaluation:
    """Evaluations on parts as one on all: metrics are means of items, seconds add up; the last one's error, if it has one."""
    last = evaluations[-1]
    seconds = {stage: math.fsum(e.seconds.get(stage, 0.0) for e in evaluations) for stage in dict.fromkeys(s for e in evaluations for s in e.seconds)}
    if last.error is not None:
        return Evaluation(last.recipe_id, (), {}, seconds, last.error)
    known = {(s.task, s.item): s for e in evaluations for s in e.items}
    scores = tuple(known[task, item] for task, ids in items.items() for item in ids)
    return Evaluation(last.recipe_id, scores, means(scores, objective), seconds)


def part_of(evaluation: Evaluation, items: Items) -> Evaluation:
    """What an evaluation on more items says of some of them, without metrics."""
    wanted = {(task, item) for task, ids in items.items() for item in ids}
    scores = tuple(s for s in evaluation.items if (s.task, s.item) in wanted)
    return Evaluation(evaluation.recipe_id, scores, {}, {}, evaluation.error)


def means(scores: Sequence[ItemScore], objective: Objective) -> dict[str, float]:
    """Metrics of tasks whose metric is the mean of their items, soft ones too, and those of the objective's groups."""
    by_task: dict[str, list[ItemScore]] = {}
    for s in scores:
        by_task.setdefault(s.task, []).append(s)
    metrics: dict[str, float] = {}
    for task, own in by_task.items():
        soft = {f"{task}:probability": [s.probability for s in own], f"{task}:logprob": [s.logprob for s in own]}
        for name, found in ({task: [s.value for s in own]} | soft).items():
            values = [v for v in found if v is not None]
            if values:
                metrics[name] = math.fsum(values) / len(values)
    groups = {t.task: t.leaves for t in objective.terms if t.leaves and all(leaf in by_task for leaf, _ in t.leaves)}
    return metrics | {group: math.fsum(share * metrics[leaf] for leaf, share in leaves) for group, leaves in groups.items()}


def _usable(evaluation: Evaluation, objective: Objective) -> bool:
    return evaluation.error is None and all(math.isfinite(s.value) for s in objective.seen(evaluation.items))


def _step(own: Mapping[int, Sequence[Evaluation]], items: Items, objective: Objective, mu: int, alpha: float) -> list[int]:
    """The slots that go on."""
    shares = objective.seen_shares
    tasks = [task for task in items if task in shares]
    rows = [{(s.task, s.item): s.value for e in evaluations for s in objective.seen(e.items)} for evaluations in own.values()]
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    values = np.array([[row[key] for key in keys] for row in rows], dtype=np.float64)  # [alive, items so far]
    strata = [tasks.index(task) for task, _ in keys]
    sizes = [len(items[task]) for task in tasks]
    kept = race_step(values, strata, range(len(rows)), mu, alpha, [shares[task] for task in tasks], sizes)
    slots = list(own)
    return [slots[i] for i in kept]
