"""The Pareto front over tasks, kept up to date as evaluations are stored.

Of each role and set of items the file keeps the evaluations that no other dominates. Candidates are compared
with those scored on the same items alone: for the search, those of one generation.
"""

from __future__ import annotations

import json

from evomerge.evaluation import Role
from evomerge.store.connection import StudyFile
from evomerge.store.records import Purpose


def add(
    file: StudyFile, evaluation: int, role: Purpose, item_set: str, task_values: tuple[float, ...]
) -> None:
    """Adds an evaluation to its front, unless one there dominates it, and removes those that it dominates.

    Args:
        file: The study's file, within a transaction.
        evaluation: Row of the evaluation.
        role: Its role.
        item_set: Id of its items.
        task_values: Values of the tasks, higher is better.
    """
    sql = (
        "SELECT f.* FROM front f JOIN evaluations e ON e.id = f.evaluation "
        "WHERE e.role = ? AND e.item_set = ?"
    )
    front = [
        (int(row["evaluation"]), tuple(json.loads(row["point"]))) for row in file.rows(sql, (role, item_set))
    ]
    if any(dominates(other_values, task_values) for _, other_values in front):
        return
    dominated = [(other,) for other, other_values in front if dominates(task_values, other_values)]
    file.db.executemany("DELETE FROM front WHERE evaluation = ?", dominated)
    file.insert("front", evaluation=evaluation, point=json.dumps(task_values))


def trial_ids(file: StudyFile, role: Role) -> list[int]:
    """Finds the candidates on the front of the newest set of items that a role has one for.

    Args:
        file: The study's file.
        role: The role of the items.

    Returns:
        For each evaluation on the front its earliest trial, in the order of their ids; empty without a front.
    """
    newest = file.row(
        "SELECT e.item_set FROM front f JOIN evaluations e ON e.id = f.evaluation "
        "WHERE e.role = ? ORDER BY e.id DESC",
        (role,),
    )
    if not newest:
        return []
    same_trial = "t.evaluation = e.id" if role == "search" else "t.recipe = e.recipe"
    sql = (
        "SELECT min(t.id) FROM front f JOIN evaluations e ON e.id = f.evaluation "
        f"JOIN trials t ON {same_trial} WHERE e.role = ? AND e.item_set = ? GROUP BY e.id ORDER BY min(t.id)"
    )
    return [int(row[0]) for row in file.rows(sql, (role, newest[0]))]


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Compares two candidates over all tasks.

    Args:
        a: Values of the tasks of one, higher is better.
        b: Values of the other, in the same order.

    Returns:
        Whether a is at least as good as b in every task and better in one.
    """
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))
