"""Candidates beside one another on the items that all were scored on: each against the first, paired.

Opens no model. What is compared is what the studies' files hold, or what the caller has scored beside them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import ConfigError, StudyError, suggest
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Role
from evomerge.evaluation.estimates import Estimate, holm, paired
from evomerge.recipes import Recipe
from evomerge.reports.summary import resolve
from evomerge.store import Store, StudyFacts, Trial


@dataclass(frozen=True, slots=True)
class Contender:
    """A candidate to compare.

    Attributes:
        name: As the user wrote it.
        study: Folder of its study.
        trial: Its trial.
        recipe: Its recipe.
        scores: (task, item) -> score of every item that it was scored on in the role, from all of
            `evaluations`.
        evaluations: Its evaluations in the role that did not fail.
    """

    name: str
    study: str
    trial: Trial
    recipe: Recipe
    scores: Mapping[tuple[str, str], ItemScore] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()


def contender(store: Store, name: str, reference: str, role: Role) -> Contender:
    """Reads a candidate with all that a study's file holds of it in a role.

    Args:
        store: An open study.
        name: What the candidate is called in the comparison.
        reference: See `evomerge.reports.resolve`.
        role: Role of the items.

    Returns:
        The candidate.

    Raises:
        StudyError: There is no such candidate.
    """
    trial = resolve(store, reference)
    found = [scored for scored_role, scored in store.evaluations(trial.recipe_id) if scored_role == role]
    if role == "test":
        found += store.usage.looks(trial.recipe_id)
    evaluations = tuple(scored.evaluation for scored in found if scored.evaluation.error is None)
    scores = {(score.task, score.item): score for evaluation in evaluations for score in evaluation.items}
    return Contender(name, store.path.parent.name, trial, store.recipe(trial.recipe_id), scores, evaluations)


def check_comparable(facts: Mapping[str, StudyFacts], task: str | None) -> list[str]:
    """Checks that candidates of several studies can be compared.

    Args:
        facts: Study -> its facts, at least one.
        task: The one task to compare on, None for all.

    Returns:
        Sentences on what a reader should know of the studies.

    Raises:
        StudyError: The studies have different tasks, or different metrics of one.
        ConfigError: They lack the task.
    """
    first, *others = facts
    metrics, hashes = facts[first].metrics, facts[first].tasks
    notes = []
    for other in others:
        other_metrics = facts[other].metrics
        if metrics != other_metrics:
            differing = sorted(
                t for t in {*metrics, *other_metrics} if metrics.get(t) != other_metrics.get(t)
            )
            raise StudyError(
                f"{first} and {other} cannot be compared: they differ in {', '.join(differing)}; "
                "compare studies with the same tasks and metrics"
            )
        changed = [name for name in metrics if hashes[name] != facts[other].tasks[name]]
        if changed:
            notes.append(
                f"{', '.join(changed)}: items, prompts or settings of {other} are not those of {first}; "
                "only items with the same content are joined"
            )
    subtasks = [name for term in facts[first].terms.values() for name, _ in term.subtasks]
    names = [*metrics, *subtasks]
    if task is not None and task not in names:
        raise ConfigError(f"{first} has no task '{task}'. {suggest(task, names)}")
    return notes


def missing_items(contenders: Sequence[Contender]) -> list[dict[str, tuple[str, ...]]]:
    """Finds the items of each candidate that another was scored on and it was not.

    Args:
        contenders: Candidates.

    Returns:
        For each candidate task -> items.
    """
    everything = list(dict.fromkeys(key for contender in contenders for key in contender.scores))
    missing = []
    for one in contenders:
        lacking: dict[str, tuple[str, ...]] = {}
        for task, item in everything:
            if (task, item) not in one.scores:
                lacking[task] = (*lacking.get(task, ()), item)
        missing.append(lacking)
    return missing


def common_items(contenders: Sequence[Contender], task: str | None = None) -> Items:
    """Finds the items that all candidates were scored on.

    Args:
        contenders: Candidates, at least one.
        task: The one task to compare on, None for all.

    Returns:
        Task -> items.

    Raises:
        StudyError: There are none; the message says who lacks how many.
    """
    shared: dict[str, tuple[str, ...]] = {}
    for name, item in contenders[0].scores:
        if task in (None, name) and all((name, item) in other.scores for other in contenders[1:]):
            shared[name] = (*shared.get(name, ()), item)
    if shared:
        return shared
    counts = [
        (one.name, sum(map(len, lacking.values())))
        for one, lacking in zip(contenders, missing_items(contenders), strict=True)
    ]
    lacks = "; ".join(f"{name} lacks {count}" for name, count in counts if count)
    raise StudyError(
        f"there are no items of this role that all were scored on: {lacks or 'none was scored on any'}; "
        "add --score, or choose another --role"
    )


def compare(contenders: Sequence[Contender], objective: Objective, task: str | None = None) -> dict[str, Any]:
    """Compares candidates on their common items: scores, and the paired difference of each to the first.

    Args:
        contenders: Candidates, at least two.
        objective: What weighs the tasks.
        task: The one task to compare on, None for all.

    Returns:
        `candidates`; `items`: number of common items; `rows`: one for each task, then the objective (unless
        `task` asks for one alone), each with `scores` [candidates] and, for each candidate but the first,
        `differences`: mean, error, p, and p corrected by Holm for all differences of the answer. A score or
        difference is None where the items do not determine it: a metric that is no mean of them, over other
        items than those stored, or an objective of another kind than a mean. Differences are in the metric's
        own direction; of the objective higher is better.

    Raises:
        StudyError: There are no common items.
    """
    items = common_items(contenders, task)
    scores = [[one.scores[name, item] for name, ids in items.items() for item in ids] for one in contenders]
    metrics = [_metrics(one, items, objective) for one in contenders]
    rows = _task_rows(scores, metrics, items, objective, task)
    if task is None:
        rows.append(_objective_row(scores, metrics, objective))
    estimates: list[Estimate] = [d for row in rows for d in row["differences"] if d is not None]
    corrected = iter(holm([estimate.p_value() for estimate in estimates]))
    for row in rows:
        row["differences"] = [
            None if difference is None else _difference_data(difference) | {"p_holm": next(corrected)}
            for difference in row["differences"]
        ]
    candidates = [
        {
            "name": one.name,
            "study": one.study,
            "id": one.trial.id,
            "label": one.trial.label,
            "recipe": one.recipe.id,
            "scored": len(one.scores),
        }
        for one in contenders
    ]
    return {"candidates": candidates, "items": sum(map(len, items.values())), "rows": rows}


def most_different_items(
    contenders: Sequence[Contender], items: Items, count: int
) -> dict[str, tuple[str, ...]]:
    """Chooses items whose outputs are worth reading: those whose values differ most, among equals by a hash.

    Args:
        contenders: Candidates that were scored on all of `items`.
        items: Items to choose from.
        count: How many to choose, from 1.

    Returns:
        Task -> chosen items.

    Raises:
        ConfigError: The count is below 1.
    """
    if count < 1:
        raise ConfigError(f"--samples takes a number of items from 1, got {count}")

    def order(key: tuple[str, str]) -> tuple[float, bytes]:
        values = [one.scores[key].value for one in contenders]
        return min(values) - max(values), hashlib.sha256("/".join(key).encode()).digest()

    chosen = sorted(((task, item) for task, ids in items.items() for item in ids), key=order)[:count]
    by_task = {name: tuple(item for task, item in chosen if task == name) for name in items}
    return {name: ids for name, ids in by_task.items() if ids}


def _task_rows(
    scores: Sequence[Sequence[ItemScore]],
    metrics: Sequence[Mapping[str, float]],
    items: Items,
    objective: Objective,
    task: str | None,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for term in objective.terms:
        shares = {subtask: share for subtask, share in term.strata if subtask in items}
        if not shares or (task not in (None, term.task) and task not in shares):
            continue
        differences = [paired(other, scores[0], shares) if term.mean else None for other in scores[1:]]
        rows.append(
            {
                "task": term.task if task is None else task,
                "items": sum(len(items[subtask]) for subtask in shares),
                "higher_is_better": term.sign > 0,
                "scores": [metric.get(term.task) for metric in metrics],
                "differences": differences,
            }
        )
    return rows


def _objective_row(
    scores: Sequence[Sequence[ItemScore]], metrics: Sequence[Mapping[str, float]], objective: Objective
) -> dict[str, Any]:
    values = [_objective_score(metric, objective) for metric in metrics]
    is_determined = objective.is_mean_of_items and all(value is not None for value in values)
    differences = [
        paired(other, scores[0], objective.shares()) if is_determined else None for other in scores[1:]
    ]
    return {
        "task": "objective",
        "items": len(scores[0]),
        "higher_is_better": True,
        "scores": values,
        "differences": differences,
    }


def _metrics(one: Contender, items: Items, objective: Objective) -> dict[str, float]:
    """Task -> metric over the items, where they determine it."""
    metrics: dict[str, float] = {}
    for term in objective.terms:
        subtasks = [(subtask, share) for subtask, share in term.strata if subtask in items]
        if term.mean and len(subtasks) == len(term.strata):
            parts = []
            for subtask, share in subtasks:
                values = [one.scores[subtask, item].value for item in items[subtask]]
                parts.append(share * math.fsum(values) / len(values))
            metrics[term.task] = math.fsum(parts)
        elif not term.mean:
            names = [subtask for subtask, _ in term.strata]
            wanted = {(subtask, item) for subtask in names for item in items.get(subtask, ())}
            on_these = [
                evaluation
                for evaluation in one.evaluations
                if {(score.task, score.item) for score in evaluation.items if score.task in names} == wanted
            ]
            if on_these:
                metrics[term.task] = on_these[-1].metrics[term.task]
    return metrics


def _objective_score(metrics: Mapping[str, float], objective: Objective) -> float | None:
    if any(term.task not in metrics for term in objective.terms):
        return None
    score = objective(metrics)
    return score if math.isfinite(score) else None


def _difference_data(difference: Estimate) -> dict[str, Any]:
    error = difference.error if math.isfinite(difference.error) else None
    return {"mean": difference.mean, "error": error, "p": difference.p_value()}
