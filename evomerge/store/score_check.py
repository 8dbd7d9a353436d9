"""Compares stored scores with the item scores that they were made of.

A digest shows what changed by accident. Whoever edits a row can write its digest too, but then the row's
metrics have to be the means of its items, its scores those that the objective makes of the metrics, and the
outcome's numbers those of the rows.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import ConfigError
from evomerge.evaluation import SOFT_METRICS, Evaluation, Objective, Term, soft_metric_name
from evomerge.store.study_facts import StudyFacts

_TOLERANCE = 1e-6  # sums in another order
_SCORED = ("search", "validation", "test")  # roles that the objective scores
_SOFT_COLUMNS = {"probability": "probabilities", "logprob": "logprobs"}


def objective_facts(objective: Objective) -> dict[str, Any]:
    """What has to be stored of an objective, beside the facts of its terms, to compute it again.

    Args:
        objective: Of a study.

    Returns:
        Plain data for `StudyFacts.objective`.
    """
    return {
        "kind": objective.kind,
        "layer_price": objective.layer_price,
        "depth": objective.depth,
        "terms": [
            {"task": term.task, "weight": term.weight, "search": [list(pair) for pair in term.search]}
            for term in objective.terms
        ],
    }


class ScoreCheck:
    """Compares the evaluations and the outcome of one study with their items."""

    def __init__(self, facts: StudyFacts) -> None:
        """Makes the check of a study.

        Args:
            facts: Of the study. Without terms nothing is compared, without an objective less.

        Raises:
            KeyError, TypeError, ValueError: The facts have another form than they are stored in.
        """
        self._facts = facts
        self._objective = stored_objective(facts)
        self._items: dict[str, list[tuple[str, int]]] = {}  # item set -> (task, number of items)

    def contradiction(self, row: sqlite3.Row, items: str, *, predicted: bool = False) -> str | None:
        """Compares an evaluation's metrics and scores with its items.

        Args:
            row: A whole row of the table `evaluations`.
            items: Its items as stored.
            predicted: Whether its score is a race's prediction for more items, which is not compared.

        Returns:
            What contradicts its items, None where nothing does.
        """
        if row["error"] is not None:
            scores = [number for number in (row["score"], row["reported"]) if number is not None]
            return f"it failed, which its score {scores[0]} contradicts" if scores else None
        if not self._facts.terms:
            return None
        metrics = json.loads(row["metrics"])
        means = self._means(row, items)
        for name, mean in means.items():
            if name in metrics and _differ(metrics[name], mean):
                return (
                    f"metric {name} is {metrics[name]:g}, its items contradict that: their mean is {mean:g}"
                )
        if row["role"] not in _SCORED:
            return None
        return self._of_objective(row, metrics, predicted)

    def contradictions(self, db: sqlite3.Connection) -> Iterator[str]:
        """Compares trials with their evaluations, and the outcome with both.

        Args:
            db: Connection to the study's file.

        Yields:
            What contradicts what is stored.
        """
        sql = "SELECT t.id FROM trials t JOIN evaluations e ON e.id = t.evaluation WHERE e.recipe != t.recipe"
        for row in db.execute(sql):
            yield f"the evaluation of trial {row[0]} is of another recipe"
        stored: dict[tuple[str | None, str], list[float]] = {}
        for row in db.execute("SELECT recipe, role, coalesce(reported, score) FROM evaluations"):
            stored.setdefault((row[0], row[1]), []).append(row[2])
        outcome = db.execute("SELECT outcome FROM study").fetchone()
        if outcome is None or not outcome[0]:
            return
        data = json.loads(outcome[0])
        for line in (data["best"], *data.get("references", ()), *data.get("finalists", ())):
            for role in _SCORED:
                value = line.get(role)
                there = stored.get((line.get("recipe"), role), [])
                if value is not None and not any(x is not None and not _differ(x, value) for x in there):
                    name = line.get("recipe")
                    yield f"the outcome's {role} score of {name} is contradicted by its evaluation"

    def _means(self, row: sqlite3.Row, items: str) -> dict[str, float]:
        """Name of a metric -> the mean of the items, for the tasks whose metric is a mean."""
        if row["item_set"] not in self._items:
            self._items[row["item_set"]] = [(task, len(ids)) for task, ids in json.loads(items)]
        terms = self._facts.terms.items()
        leaves = {leaf for _, term in terms if term.mean for leaf, _ in term.subtasks}
        columns = {"": json.loads(row["scores"])}
        for soft in SOFT_METRICS:
            text = row[_SOFT_COLUMNS[soft]]
            columns |= {soft: json.loads(text)} if text else {}
        means: dict[str, float] = {}
        first = 0
        for task, count in self._items[row["item_set"]]:
            for kind, values in columns.items() if task in leaves else ():
                own = [value for value in values[first : first + count] if value is not None]
                if own:
                    means[soft_metric_name(task, kind) if kind else task] = math.fsum(own) / len(own)
            first += count
        return means

    def _of_objective(self, row: sqlite3.Row, metrics: Mapping[str, float], predicted: bool) -> str | None:
        """What contradicts the metrics by the objective, or by their bounds where it is not stored."""
        reported = row["reported"]
        costs = json.loads(row["costs"]) if row["costs"] else {}
        evaluation = Evaluation(row["recipe"], (), metrics, {}, None, costs)
        try:
            if self._objective is None:
                return _out_of_bounds(self._terms(), reported, metrics)
            expected = self._objective.reported_score(evaluation)
            penalty = self._objective.size_penalty(costs)
            score = expected
            if row["role"] == "search":
                score = None if predicted else self._objective.search_score(metrics)
        except ConfigError:  # it was scored on a part of the tasks
            return None
        if expected is None:
            return None if row["score"] is None else "its score contradicts metrics that are not finite"
        if reported is not None and _differ(reported, expected):
            return f"its score {reported:g} is contradicted by its metrics, which make {expected:g}"
        if score is not None and row["score"] is not None and _differ(row["score"], score - penalty):
            return (
                f"its score {row['score']:g} is contradicted by its metrics, which make {score - penalty:g}"
            )
        return None

    def _terms(self) -> list[Term]:
        """The terms without their weights."""
        return [
            Term(task, sign=term.sign, subtasks=term.subtasks, mean=term.mean)
            for task, term in self._facts.terms.items()
        ]


def stored_objective(facts: StudyFacts) -> Objective | None:
    """Makes the objective of a study again from what is stored of it.

    Args:
        facts: Of the study.

    Returns:
        The objective; None for a study of a version that did not store it.

    Raises:
        KeyError, TypeError, ValueError: The facts have another form than they are stored in.
    """
    stored = facts.objective
    if not stored or not facts.terms:
        return None
    terms = []
    for term in stored["terms"]:
        of_task = facts.terms[term["task"]]
        search = tuple((kind, share) for kind, share in term["search"])
        terms.append(Term(term["task"], term["weight"], of_task.sign, search, of_task.subtasks, of_task.mean))
    return Objective(tuple(terms), stored["kind"], layer_price=stored["layer_price"], depth=stored["depth"])


def _out_of_bounds(terms: list[Term], reported: float | None, metrics: Mapping[str, float]) -> str | None:
    """Says where a reported score is none that any weights make of the metrics."""
    values = [term.value(metrics) for term in terms]
    if reported is None or not all(map(math.isfinite, values)):
        return None
    low, high = min(values), max(values)
    if reported == 0 or low - _TOLERANCE <= reported <= high + _TOLERANCE:
        return None
    return f"its score {reported:g} is contradicted by its metrics, which lie between {low:g} and {high:g}"


def _differ(a: float, b: float) -> bool:
    return not math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) and not (
        math.isnan(a) and math.isnan(b)
    )
