"""The retention constraint (`keep` in the search file): how near a candidate must come to the best parent.

A task's floor is the mean of its best parent on the same items, less what may be lost. The best parent is
found once, on all search items; its mean on any generation's items then follows from its item scores, without
another evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluation import Evaluation, Items, ItemScore, Objective


@dataclass(frozen=True, slots=True)
class BestParent:
    """The parent that a task's floor comes from.

    Attributes:
        label: Name of the model.
        evaluation: Of it on all search items.
    """

    label: str
    evaluation: Evaluation


def best_parents(objective: Objective, parents: Sequence[BestParent], items: Items) -> dict[str, BestParent]:
    """The best parent of each constrained task.

    Args:
        objective: Its `keep` names the tasks.
        parents: At least one, each scored on all `items`.
        items: Task -> all search items.

    Returns:
        Task -> its best parent; the first of equal ones.
    """
    best: dict[str, BestParent] = {}
    for task, _ in objective.keep:
        best[task] = max(parents, key=lambda parent: _floor(objective, task, parent, items))
    return best


def floors(objective: Objective, parents: Mapping[str, BestParent], items: Items) -> dict[str, float]:
    """What the constraint requires on some search items.

    Args:
        objective: Its `keep` says what may be lost.
        parents: Task -> its best parent.
        items: Task -> item ids, of those that the parents were scored on.

    Returns:
        Task -> least value; empty without a constraint.
    """
    return {task: _floor(objective, task, parent, items) for task, parent in parents.items()}


def item_means(
    objective: Objective, task: str, scores: Sequence[ItemScore], items: Items
) -> dict[str, float]:
    """Metrics of a task, or of the subtasks of a group, over some of the items that a model was scored on.

    Args:
        objective: Has a term of that task, whose metric is the mean of its items.
        task: Name of the term.
        scores: Item scores of the model; those of `items` must be among them.
        items: Task -> item ids to average over.

    Returns:
        Task or subtask -> mean value.
    """
    term = next(t for t in objective.terms if t.task == task)
    values = {(s.task, s.item): s.value for s in scores}
    return {
        stratum: math.fsum(values[stratum, item] for item in items[stratum]) / len(items[stratum])
        for stratum, _ in term.strata
    }


def _floor(objective: Objective, task: str, parent: BestParent, items: Items) -> float:
    """The value that a parent's scores on some items require of a candidate."""
    means = item_means(objective, task, parent.evaluation.items, items)
    return objective.floors({task: means})[task]
