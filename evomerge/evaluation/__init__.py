"""What scores a model: per-item records, the objective over them, estimates, task sets.

`lm_harness` runs lm-eval's tasks, `inference` runs the forwards behind them. What this package exports loads no torch.
"""

from __future__ import annotations

from evomerge.evaluation.evaluator import Evaluator, Preparing
from evomerge.evaluation.objective import Objective, Standing, Term, missing_metric_message, ranks
from evomerge.evaluation.records import ROLES, Attempt, Evaluation, Items, ItemScore, Role
from evomerge.evaluation.task_set import CombinedTasks, TaskSet

__all__ = [
    "ROLES",
    "Attempt",
    "CombinedTasks",
    "Evaluation",
    "Evaluator",
    "ItemScore",
    "Items",
    "Objective",
    "Preparing",
    "Role",
    "Standing",
    "TaskSet",
    "Term",
    "missing_metric_message",
    "ranks",
]
