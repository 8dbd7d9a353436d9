"""Candidates beside one another on the items that all were scored on: each against the first, paired. Knows nothing of models.

What is compared is what the studies' files hold, or what the caller has scored beside them.
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
    """A candidate to compare. name: as the user wrote it; study: the folder of its study; scores: of every item that it was
    scored on in the role, from all of its evaluations there."""

    name: str
    study: str
    trial: Trial
    recipe: Recipe
    scores: Mapping[tuple[str, str], ItemScore] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()


def contender(store: Store, name: str, reference: str, role: Role) -> Contender:
    """The candidate of a study that a reference names, with all that the study's file holds of it in a role."""
    trial = resolve(store, reference)
    evaluations = tuple(
        s.evaluation
        for r, s in store.evaluations(trial.recipe_id)
        if r == role and s.evaluation.error is None
    )
    scores = {(s.task, s.item): s for e in evaluations for s in e.items}
    return Contender(name, store.path.parent.name, trial, store.recipe(trial.recipe_id), scores, evaluations)


def check(facts: Mapping[str, StudyFacts], task: str | None) -> list[str]:
    """What a reader should know of studies compared. facts: study -> its stored facts. Raises StudyError unless all have the
    same tasks by the same metrics, and ConfigError for a task that they lack."""
    first, *others = facts
    notes = []
    for other in others:
        mine, theirs = facts[first].metrics, facts[other].metrics
        if mine != theirs:
            differing = sorted(t for t in {*mine, *theirs} if mine.get(t) != theirs.get(t))
            raise StudyError(
                f"{first} and {other} cannot be compared: they differ in {', '.join(differing)}; compare studies with the same tasks and metrics"
            )
        changed = [t for t in mine if facts[first].tasks[t] != facts[other].tasks[t]]
        if changed:
            named = ", ".join(changed)
            notes.append(
                f"{named}: items, prompts or settings of {other} are not those of {first}; only items with the same content are joined"
            )
    leaves = [leaf for term in facts[first].terms.values() for leaf, _ in term.subtasks]
    if task is not None and task not in (*facts[first].metrics, *leaves):
        raise ConfigError(f"{first} has no task '{task}'. {suggest(task, [*facts[first].metrics, *leaves])}")
    return notes


def missing(contenders: Sequence[Contender]) -> list[dict[str, tuple[str, ...]]]:
    """Of each candidate the items, by task, that another was scored on and it was not."""
    everything = list(dict.fromkeys(key for c in contenders for key in c.scores))
    found = []
    for c in contenders:
        lacking: dict[str, tuple[str, ...]] = {}
        for task, item in everything:
            if (task, item) not in c.scores:
                lacking[task] = (*lacking.get(task, ()), item)
        found.append(lacking)
    return found


def common(contenders: Sequence[Contender], task: str | None = None) -> Items:
    """The items that all were scored on, by task. Raises StudyError where there are none, saying who lacks what."""
    shared: dict[str, tuple[str, ...]] = {}
    for name, item in contenders[0].scores:
        if all((name, item) in c.scores for c in contenders[1:]) and task in (None, name):
            shared[name] = (*shared.get(name, ()), item)
    if not shared:
        lacks = [
            f"{c.name} lacks {n}"
            for c, m in zip(contenders, missing(contenders), strict=True)
            if (n := sum(map(len, m.values())))
        ]
        what = "; ".join(lacks) or "none was scored on any"
        raise StudyError(
            f"there are no items of this role that all were scored on: {what}; add --score, or choose another --role"
        )
    return shared


def compare(contenders: Sequence[Contender], objective: Objective, task: str | None = None) -> dict[str, Any]:
    """Scores on the common items by task and of the objective, and each candidate's paired difference to the first.

    rows: one a task, then the objective (unless `task` asks for one alone), each with `scores` [candidates] and, for each
    candidate but the first, `differences`: mean, error, p, and p corrected by Holm for all differences in the answer. A
    score or difference is None where the items do not tell it: a metric that is no mean of them, over other items than
    those stored, or an objective of another kind than a mean. Differences are in the metric's own direction; in the objective higher is better.
    """
    items = common(contenders, task)
    kept = [[c.scores[t, i] for t, ids in items.items() for i in ids] for c in contenders]
    known = [_metrics(c, items, objective) for c in contenders]
    rows = []
    for term in objective.terms:
        shares = {leaf: share for leaf, share in term.strata if leaf in items}
        if shares and (task in (None, term.task) or task in shares):
            row: dict[str, Any] = {
                "task": term.task if task is None else task,
                "items": sum(len(items[leaf]) for leaf in shares),
            }
            row |= {"higher_is_better": term.sign > 0, "scores": [m.get(term.task) for m in known]}
            rows.append(
                row | {"differences": [paired(k, kept[0], shares) if term.mean else None for k in kept[1:]]}
            )
    if task is None:
        whole = [_objective(m, objective) for m in known]
        told = objective.is_mean_of_items and all(w is not None for w in whole)
        differences = [paired(k, kept[0], objective.shares()) if told else None for k in kept[1:]]
        rows.append(
            {
                "task": "objective",
                "items": len(kept[0]),
                "higher_is_better": True,
                "scores": whole,
                "differences": differences,
            }
        )
    estimates: list[Estimate] = [d for row in rows for d in row["differences"] if d is not None]
    corrected = iter(holm([d.p_value() for d in estimates]))
    for row in rows:
        row["differences"] = [
            None if d is None else _plain(d) | {"p_holm": next(corrected)} for d in row["differences"]
        ]
    candidates = [
        {
            "name": c.name,
            "study": c.study,
            "id": c.trial.id,
            "label": c.trial.label,
            "recipe": c.recipe.id,
            "scored": len(c.scores),
        }
        for c in contenders
    ]
    return {"candidates": candidates, "items": sum(map(len, items.values())), "rows": rows}


def telling(contenders: Sequence[Contender], items: Items, count: int) -> dict[str, tuple[str, ...]]:
    """`count` of the items to look at, by task: those whose values differ most come first, among equals a hash decides."""
    if count < 1:
        raise ConfigError(f"--samples takes a number of items from 1, got {count}")

    def place(key: tuple[str, str]) -> tuple[float, bytes]:
        values = [c.scores[key].value for c in contenders]
        return min(values) - max(values), hashlib.sha256("/".join(key).encode()).digest()

    chosen = sorted(((t, i) for t, ids in items.items() for i in ids), key=place)[:count]
    return {t: ids for t in items if (ids := tuple(i for task, i in chosen if task == t))}


def _metrics(c: Contender, items: Items, objective: Objective) -> dict[str, float]:
    """Task -> metric over the items, where they tell it."""
    out: dict[str, float] = {}
    for term in objective.terms:
        leaves = [(leaf, share) for leaf, share in term.strata if leaf in items]
        if term.mean and len(leaves) == len(term.strata):
            values = [(share, [c.scores[leaf, i].value for i in items[leaf]]) for leaf, share in leaves]
            out[term.task] = math.fsum(share * math.fsum(v) / len(v) for share, v in values)
        elif not term.mean:
            wanted = {(leaf, item) for leaf, _ in term.strata for item in items.get(leaf, ())}
            tasks = [leaf for leaf, _ in term.strata]
            whole = [
                e for e in c.evaluations if {(s.task, s.item) for s in e.items if s.task in tasks} == wanted
            ]
            if whole:
                out[term.task] = whole[-1].metrics[term.task]
    return out


def _objective(metrics: Mapping[str, float], objective: Objective) -> float | None:
    score = objective(metrics) if all(t.task in metrics for t in objective.terms) else math.nan
    return score if math.isfinite(score) else None


def _plain(d: Estimate) -> dict[str, Any]:
    return {"mean": d.mean, "error": d.error if math.isfinite(d.error) else None, "p": d.p_value()}
