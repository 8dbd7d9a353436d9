"""A generation's race: all candidates on few items first, on more only while it is open whether they are
among its best.

Rungs are nested parts of the generation's items. After each rung but the last, those that are sure to be
among the best mu
on all the items are chosen, those that are sure not to be are dropped, and the others go on: see
`subset_selection`. The
probability that the best mu are not those that all items would have given is meant to be at most `error` a
generation, shared
out evenly between the rungs; results/racing.md has what was found: half to three quarters of it, but up to
2.5 times where
candidates are all alike and which are the best means nothing. An optimizer learns the order of the best from
scores made
comparable, and of the dropped how far they came. Knows nothing of stores, pools or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.errors import ConfigError
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, mean_metrics
from evomerge.recipes import Recipe
from evomerge.search.racing_statistics import Array, aligned, allocate, deviations, settle

Score = Callable[[Sequence[Recipe], Items], Mapping[str, Evaluation]]
"""Scores recipes on items: recipe id -> evaluation."""
Seen = dict[tuple[str, str], float]
"""(task, item) -> value as the search sees it."""


@dataclass(frozen=True, slots=True)
class Race:
    """rungs: shares of the items, in (0, 1], increasing, the last 1. error: see the module, in (0, 1)."""

    rungs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
    error: float = 0.05

    def __post_init__(self) -> None:
        increasing = all(a < b for a, b in zip((0.0, *self.rungs), self.rungs, strict=False))
        if not self.rungs or not increasing or self.rungs[-1] != 1.0:
            raise ConfigError(
                "the rungs of a race are increasing shares of the items that end with 1, got "
                f"{list(self.rungs)}"
            )
        if not 0.0 < self.error < 1.0:
            raise ConfigError(f"the error rate of a race must be in (0, 1), got {self.error:g}")


@dataclass(frozen=True, slots=True)
class RaceResult:
    """How a candidate fared. items: those it was scored on; dropped: the rung, from 1, after which it was
    dropped;
    predicted: what the search would see on all items, of a candidate that was not scored on all."""

    evaluation: Evaluation
    items: Items
    dropped: int | None
    predicted: float | None = None


def check(objective: Objective) -> None:
    """Raises ConfigError where an objective cannot be raced: paired tests need a mean of item values."""
    if objective.kind != "mean":
        raise ConfigError(
            f"a race compares means of items, and a '{objective.kind}' objective is none; choose 'mean', "
            "or leave out search.race"
        )
    if objective.keep:
        raise ConfigError(
            "a race drops candidates by their score alone and would pass over 'keep'; leave out one of the "
            "two"
        )
    if objective.layer_price:
        raise ConfigError(
            "a race drops candidates by their score alone and would pass over routes.penalty; leave out "
            "one of the two"
        )
    for term in objective.terms:
        if not term.mean:
            raise ConfigError(
                f"a race compares means of items, and the metric of task '{term.task}' is aggregated "
                "otherwise; leave out search.race"
            )


def run(
    candidates: Mapping[int, Recipe], items: Items, race: Race, objective: Objective, mu: int, score: Score
) -> dict[int, RaceResult]:
    """Races the candidates of a generation; slot -> how each fared. mu: how many of the best the optimizer
    learns from.

    Deterministic: the same item scores give the same race. One that fails, or has a value that is not finite,
    is out of it.
    """
    own: dict[int, list[Evaluation]] = {slot: [] for slot in candidates}
    seen: dict[int, Seen] = {slot: {} for slot in candidates}
    parts: list[Items] = []
    dropped: dict[int, int] = {}
    alive, failed, chosen = list(candidates), list[int](), list[int]()
    for rung, share in enumerate(race.rungs, start=1):
        part = increment(items, parts, share, objective, [seen[slot] for slot in alive]) if alive else {}
        if not part:
            continue
        parts.append(part)
        scored = score([candidates[slot] for slot in alive], part)
        for slot in alive:
            own[slot].append(scored[candidates[slot].id])
            seen[slot] |= {(s.task, s.item): s.value for s in objective.search_items(own[slot][-1].items)}
        failed += [
            slot
            for slot in alive
            if own[slot][-1].error is not None or not all(map(math.isfinite, seen[slot].values()))
        ]
        alive = [slot for slot in alive if slot not in failed]
        if rung < len(race.rungs) and alive:
            values, sizes, weights = _tables(items, parts, objective, [seen[slot] for slot in alive])
            found = settle(
                values, sizes, weights, mu - len(chosen), race.error / (len(race.rungs) - 1), (rung,)
            )
            chosen += [alive[i] for i in found.chosen]
            dropped |= {alive[i]: rung for i in found.dropped}
            alive = [alive[i] for i in found.open]
    predicted = _predicted(items, objective, {slot: seen[slot] for slot in own if slot not in failed})
    out = {}
    for slot, evaluations in own.items():
        done = together(items, parts[: len(evaluations)])
        whole = slot in failed or sum(map(len, done.values())) == sum(map(len, items.values()))
        out[slot] = RaceResult(
            union(evaluations, done, objective), done, dropped.get(slot), None if whole else predicted[slot]
        )
    finished = sorted((objective.search_score(out[slot].evaluation.metrics) for slot in alive), reverse=True)
    if (
        len(chosen) + len(finished) > mu >= len(chosen)
    ):  # who is among the best scores more than who is left over
        least = math.nextafter(finished[mu - len(chosen)], math.inf)
        out |= {
            slot: replace(out[slot], predicted=max(least, predicted[slot]))
            for slot in chosen
            if out[slot].predicted is not None
        }
    return out


def increment(
    items: Items, parts: Sequence[Items], share: float, objective: Objective, alive: Sequence[Seen]
) -> Items:
    """What a rung adds: the next ids of each task, so that a share of all items has been scored after it.

    parts: the rungs before; alive: the scores so far of those that go on. First every task gives its share,
    and two items
    at least, without which it has no error. Later more is taken of the tasks that tell the candidates apart,
    by
    `subset_selection.allocate`.
    """
    taken = {task: sum(len(part.get(task, ())) for part in parts) for task in items}
    sizes = {task: len(ids) for task, ids in items.items()}
    if share == 1.0:
        ends = sizes
    elif not parts:
        ends = {task: min(n, max(2, math.ceil(share * n - 1e-9))) for task, n in sizes.items()}
    else:
        values, _, weights = _tables(items, parts, objective, alive)
        tasks = [task for task in items if task in objective.search_shares]
        goal = math.ceil(share * sum(sizes.values()) - 1e-9)
        counts = allocate(
            deviations(values, weights), weights, [taken[t] for t in tasks], [sizes[t] for t in tasks], goal
        )
        ends = taken | dict(zip(tasks, counts, strict=True))
    return {
        task: tuple(ids[taken[task] : ends[task]]) for task, ids in items.items() if taken[task] < ends[task]
    }


def together(items: Items, parts: Sequence[Items]) -> Items:
    """The items of several rungs as one set, in the order of the generation's."""
    return {task: tuple(item for part in parts for item in part.get(task, ())) for task in items}


def union(evaluations: Sequence[Evaluation], items: Items, objective: Objective) -> Evaluation:
    """Evaluations on parts as one on all: metrics are means of items, seconds add up; the last one's error,
    if it has one."""
    last = evaluations[-1]
    seconds = {
        stage: math.fsum(e.seconds.get(stage, 0.0) for e in evaluations)
        for stage in dict.fromkeys(s for e in evaluations for s in e.seconds)
    }
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
    """Metrics of tasks whose metric is the mean of their items, soft ones too, and those of the objective's
    groups."""
    by_task: dict[str, list[ItemScore]] = {}
    for s in scores:
        by_task.setdefault(s.task, []).append(s)
    metrics: dict[str, float] = {}
    for task, own in by_task.items():
        metrics |= mean_metrics(task, own)
    groups = {
        t.task: t.subtasks
        for t in objective.terms
        if t.subtasks and all(leaf in by_task for leaf, _ in t.subtasks)
    }
    return metrics | {
        group: math.fsum(share * metrics[leaf] for leaf, share in leaves) for group, leaves in groups.items()
    }


def _tables(
    items: Items, parts: Sequence[Items], objective: Objective, rows: Sequence[Seen]
) -> tuple[list[Array], list[int], list[float]]:
    """By task of the objective: [candidates, items so far] scores as the search sees them, how many there
    will be, and the weight.

    Items without the soft score that is searched by are not counted. All rows hold the same items.
    """
    shares = objective.search_shares
    tasks = [task for task in items if task in shares]
    ids = {task: [item for part in parts for item in part.get(task, ())] for task in tasks}
    used = {task: [(task, item) for item in ids[task] if (task, item) in rows[0]] for task in tasks}
    values = [
        np.array([[row[key] for key in used[task]] for row in rows], dtype=np.float64) for task in tasks
    ]
    return (
        values,
        [len(items[t]) - len(ids[t]) + len(used[t]) for t in tasks],
        [shares[task] for task in tasks],
    )


def _predicted(items: Items, objective: Objective, rows: Mapping[int, Seen]) -> dict[int, float]:
    """Slot -> the objective as the search sees it, made comparable between candidates that were scored on
    more and fewer items."""
    if not rows:
        return {}
    shares = objective.search_shares
    tasks = [task for task in items if task in shares]
    values = [
        np.array([[row.get((task, item), math.nan) for item in items[task]] for row in rows.values()])
        for task in tasks
    ]
    return dict(zip(rows, aligned(values, [shares[task] for task in tasks]).tolist(), strict=True))
