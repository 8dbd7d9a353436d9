"""What a card says of a candidate's scores: with intervals and numbers of items, beside its parents'."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from evomerge._escaping import markdown
from evomerge.evaluation import Evaluation, Objective
from evomerge.evaluation.intervals import lead_interval, score_interval
from evomerge.export.front_matter import TestResult
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.store import Scored, score_check

Interval = tuple[float, float]
OWN = "this model"
"""What a table calls the candidate."""
INTERVALS = "95 % intervals: Wilson's for shares of right answers, Student's t for other values (MOVER)"
"""How intervals are made, see `evomerge.evaluation.intervals`."""


@dataclass(frozen=True, slots=True)
class RoleScore:
    """What a model scored on the items of a role.

    Attributes:
        model: `OWN`, or the name of a parent.
        role: 'validation' or 'test'.
        scored: The evaluation.
    """

    model: str
    role: str
    scored: Scored


def role_scores(candidate: StoredCandidate) -> list[RoleScore]:
    """Reads what a candidate and the parents scored on validation and test items.

    Args:
        candidate: The candidate.

    Returns:
        The candidate's, then each parent's, the last evaluation of a role; failed ones are left out.
    """
    store = candidate.store
    models = [(OWN, candidate.trial.recipe_id)]
    models += [(str(trial.label), trial.recipe_id) for trial in store.trials() if trial.origin == "parent"]
    rows = []
    for name, recipe_id in models:
        last = {role: scored for role, scored in store.evaluations(recipe_id) if scored.score is not None}
        rows += [RoleScore(name, role, last[role]) for role in ("validation", "test") if role in last]
    return rows


def score_table(candidate: StoredCandidate) -> list[str]:
    """Writes the table of scores, and the lead over each parent on the test items.

    Args:
        candidate: The candidate.

    Returns:
        Lines of Markdown.
    """
    facts = candidate.study.facts
    objective = score_check.stored_objective(facts)
    tasks = list(facts.tasks)
    rows = role_scores(candidate)
    lines = [
        "| model | items of | n | objective | " + " | ".join(map(markdown, tasks)) + " |",
        "| --- " * (4 + len(tasks)) + "|",
    ]
    for row in rows:
        evaluation = row.scored.evaluation
        cells = [_cell(row.scored.score, objective_interval(objective, row.scored))]
        cells += [
            _cell(evaluation.metrics.get(task), task_interval(candidate, task, evaluation)) for task in tasks
        ]
        start = f"| {markdown(row.model)} | {row.role} | {len(evaluation.items)} | "
        lines.append(f"{start}{' | '.join(cells)} |")
    leads = [*_leads(objective, rows)]
    return [*lines, "", *leads, *([""] if leads else []), f"{INTERVALS}."]


def test_results(candidate: StoredCandidate) -> list[TestResult]:
    """Reads what a candidate scored in each task on test items.

    Args:
        candidate: The candidate.

    Returns:
        A result for each task whose metric is finite; none where it was not scored on test items.
    """
    own = [row for row in role_scores(candidate) if (row.model, row.role) == (OWN, "test")]
    facts, results = candidate.study.facts, []
    for row in own:
        evaluation = row.scored.evaluation
        for task, term in facts.terms.items():
            value = evaluation.metrics.get(task)
            if value is None or not math.isfinite(value):
                continue
            tasks = {name for name, _ in term.subtasks} or {task}
            count = sum(item.task in tasks for item in evaluation.items)
            interval = task_interval(candidate, task, evaluation)
            results.append(TestResult(task, facts.metrics.get(task, "score"), value, count, interval))
    return results


def task_interval(candidate: StoredCandidate, task: str, evaluation: Evaluation) -> Interval | None:
    """Computes the interval of a task's metric.

    Args:
        candidate: Whose study says what the metric is.
        task: The task.
        evaluation: Of any model on items of the study.

    Returns:
        (low, high); None where the metric is no mean of items or there is no finite one.
    """
    term, value = candidate.study.facts.terms.get(task), evaluation.metrics.get(task)
    if term is None or not term.mean or value is None or not evaluation.items:
        return None
    shares = dict(term.subtasks) or {task: 1.0}
    return _finite(score_interval(evaluation.items, shares, value))


def objective_interval(objective: Objective | None, scored: Scored) -> Interval | None:
    """Computes the interval of a reported objective.

    Args:
        objective: Of the study, None where it is not stored.
        scored: An evaluation.

    Returns:
        (low, high); None where a metric is no mean of items or there is no finite one.
    """
    evaluation = scored.evaluation
    if objective is None or scored.reported is None or not evaluation.items:
        return None
    if not all(term.mean for term in objective.terms):
        return None
    return _finite(score_interval(evaluation.items, objective.shares(evaluation.metrics), scored.reported))


def _leads(objective: Objective | None, rows: list[RoleScore]) -> Iterator[str]:
    """The lead over each parent on the same test items, paired."""
    tested = {row.model: row.scored for row in rows if row.role == "test"}
    own = tested.pop(OWN, None)
    if own is None or objective is None or not objective.is_mean_of_items:
        return
    for name, other in tested.items():
        if own.reported is None or other.reported is None:
            continue
        if other.evaluation.recipe_id == own.evaluation.recipe_id:
            continue
        lead = own.reported - other.reported
        items, others = own.evaluation.items, other.evaluation.items
        found = _finite(lead_interval(items, others, objective.shares(), lead))
        if found is not None:
            unclear = ", no clear difference" if found[0] <= 0 <= found[1] else ""
            yield (
                f"- against {markdown(name)}, on the same test items: {lead:+.4f} "
                f"(95 %: {found[0]:+.4f} to {found[1]:+.4f}{unclear})"
            )


def _cell(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if interval is None else f"{value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _finite(interval: Interval) -> Interval | None:
    return interval if all(map(math.isfinite, interval)) else None
