"""A generation's race: all candidates are scored on few items, and on more only while their rank is open.

Rungs are nested parts of the generation's items. After each rung but the last, candidates that are sure to be
among the best mu on all the items are chosen, those that are sure not to be are dropped, and the others go
on: see `racing_statistics`. The probability that the best mu are not those that all items would have given is
meant to be at most `error` a generation, shared out evenly between the rungs. results/racing.md has what was
found: half to three quarters of it, but up to 2.5 times where all candidates are alike and which are the best
means nothing. An optimizer learns the order of the best from scores made comparable, and of the dropped how
far they came. Knows nothing of stores, pools or optimizers.
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
    """Settings of a race.

    Attributes:
        rungs: Shares of the items, in (0, 1], increasing, the last 1.
        error: Probability in (0, 1) that the best of a generation are others than all items would give.
    """

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
    """How a candidate fared.

    Attributes:
        evaluation: Its scores, all rungs as one.
        items: The items it was scored on.
        dropped: The rung, from 1, after which it was dropped; None where it was not.
        predicted: What the search would see on all items, of a candidate that was not scored on all.
    """

    evaluation: Evaluation
    items: Items
    dropped: int | None
    predicted: float | None = None


def check(objective: Objective) -> None:
    """Checks that an objective can be raced: paired tests need a mean of item values.

    Args:
        objective: What the search maximizes.

    Raises:
        ConfigError: Where it cannot.
    """
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
    """Races the candidates of a generation.

    Deterministic: the same item scores give the same race. A candidate that fails, or has a value that is not
    finite, is out of it.

    Args:
        candidates: Slot -> recipe.
        items: The generation's items.
        race: Rungs and error probability.
        objective: A mean of item values, see `check`.
        mu: How many of the best the optimizer learns from.
        score: Scores recipes on items.

    Returns:
        Slot -> how each fared.
    """
    state = _State(candidates, items, objective)
    for rung, share in enumerate(race.rungs, start=1):
        part = increment(items, state.parts, share, objective, state.rows()) if state.alive else {}
        if not part:
            continue
        state.add(part, score([candidates[slot] for slot in state.alive], part))
        if rung < len(race.rungs) and state.alive:
            state.settle(mu, race.error / (len(race.rungs) - 1), rung)
    return state.results(mu)


class _State:
    """A race under way: what each candidate scored, and who is alive, chosen, dropped or failed."""

    def __init__(self, candidates: Mapping[int, Recipe], items: Items, objective: Objective) -> None:
        self._candidates, self._items, self._objective = candidates, items, objective
        self._own: dict[int, list[Evaluation]] = {slot: [] for slot in candidates}
        self._seen: dict[int, Seen] = {slot: {} for slot in candidates}
        self._dropped: dict[int, int] = {}
        self._failed: list[int] = []
        self._chosen: list[int] = []
        self.parts: list[Items] = []
        self.alive = list(candidates)

    def rows(self) -> list[Seen]:
        """Scores so far of those that go on."""
        return [self._seen[slot] for slot in self.alive]

    def add(self, part: Items, scored: Mapping[str, Evaluation]) -> None:
        """Takes the scores of a rung; those that failed are out."""
        self.parts.append(part)
        for slot in self.alive:
            evaluation = scored[self._candidates[slot].id]
            self._own[slot].append(evaluation)
            self._seen[slot] |= {
                (s.task, s.item): s.value for s in self._objective.search_items(evaluation.items)
            }
            if evaluation.error is not None or not all(map(math.isfinite, self._seen[slot].values())):
                self._failed.append(slot)
        self.alive = [slot for slot in self.alive if slot not in self._failed]

    def settle(self, mu: int, error: float, rung: int) -> None:
        """Chooses those that are sure to be among the best mu and drops those that are sure not to be."""
        values, sizes, weights = _tables(self._items, self.parts, self._objective, self.rows())
        found = settle(values, sizes, weights, mu - len(self._chosen), error, (rung,))
        self._chosen += [self.alive[i] for i in found.chosen]
        self._dropped |= {self.alive[i]: rung for i in found.dropped}
        self.alive = [self.alive[i] for i in found.open]

    def results(self, mu: int) -> dict[int, RaceResult]:
        """How each candidate fared, by slot."""
        ranked = {slot: seen for slot, seen in self._seen.items() if slot not in self._failed}
        predicted = _predicted(self._items, self._objective, ranked)
        every = sum(map(len, self._items.values()))
        out = {}
        for slot, evaluations in self._own.items():
            done = together(self._items, self.parts[: len(evaluations)])
            whole = slot in self._failed or sum(map(len, done.values())) == every
            out[slot] = RaceResult(
                union(evaluations, done, self._objective),
                done,
                self._dropped.get(slot),
                None if whole else predicted[slot],
            )
        return out | self._raised(out, predicted, mu)

    def _raised(
        self, out: Mapping[int, RaceResult], predicted: Mapping[int, float], mu: int
    ) -> dict[int, RaceResult]:
        """Those chosen early, with a prediction above the scores of all that are not among the best mu."""
        scores = [self._objective.search_score(out[slot].evaluation.metrics) for slot in self.alive]
        open_places = mu - len(self._chosen)
        if not 0 <= open_places < len(scores):
            return {}
        least = math.nextafter(sorted(scores, reverse=True)[open_places], math.inf)
        return {
            slot: replace(out[slot], predicted=max(least, predicted[slot]))
            for slot in self._chosen
            if out[slot].predicted is not None
        }


def increment(
    items: Items, parts: Sequence[Items], share: float, objective: Objective, alive: Sequence[Seen]
) -> Items:
    """Chooses what a rung adds: the next items of each task, so that a share of all was scored after it.

    First every task gives its share, and two items at least, without which it has no error. Later more is
    taken of the tasks that tell the candidates apart, by `racing_statistics.allocate`.

    Args:
        items: The generation's items.
        parts: Items of the rungs before.
        share: Share of all items that is to be scored after the rung, in (0, 1].
        objective: A mean of item values.
        alive: Scores so far of the candidates that go on.

    Returns:
        The rung's items; empty where nothing is left to add.
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
    """Joins the items of several rungs.

    Args:
        items: The generation's items.
        parts: Items of the rungs.

    Returns:
        One set, its tasks in the order of the generation's.
    """
    return {task: tuple(item for part in parts for item in part.get(task, ())) for task in items}


def union(evaluations: Sequence[Evaluation], items: Items, objective: Objective) -> Evaluation:
    """Joins evaluations on parts: metrics are means of items, seconds add up.

    Args:
        evaluations: One for each part, of one recipe.
        items: The items of all parts.
        objective: A mean of item values.

    Returns:
        One evaluation on all the items, with the last one's error if it has one.
    """
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
    """Selects items of an evaluation.

    Args:
        evaluation: An evaluation on these items and others.
        items: The items that are wanted.

    Returns:
        Their scores as an evaluation without metrics.
    """
    wanted = {(task, item) for task, ids in items.items() for item in ids}
    scores = tuple(s for s in evaluation.items if (s.task, s.item) in wanted)
    return Evaluation(evaluation.recipe_id, scores, {}, {}, evaluation.error)


def means(scores: Sequence[ItemScore], objective: Objective) -> dict[str, float]:
    """Computes metrics of tasks whose metric is the mean of their items, soft ones too.

    Args:
        scores: Scores of items.
        objective: Gives the groups and the shares of their tasks.

    Returns:
        Metric -> value of the tasks, and of the groups whose tasks are all there.
    """
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
    """By task of the objective: scores as the search sees them, how many there will be, and the weight.

    Scores are of shape [candidates, items so far]. Items without the soft score that is searched by are not
    counted. All rows hold the same items.
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
    """Slot -> the objective as the search sees it, comparable whatever the number of items scored."""
    if not rows:
        return {}
    shares = objective.search_shares
    tasks = [task for task in items if task in shares]
    values = [
        np.array([[row.get((task, item), math.nan) for item in items[task]] for row in rows.values()])
        for task in tasks
    ]
    return dict(zip(rows, aligned(values, [shares[task] for task in tasks]).tolist(), strict=True))
