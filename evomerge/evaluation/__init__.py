"""What scores a model: per-item records, the objective over them, estimates, and sets of tasks.

- `records`: `Evaluation`, `ItemScore` and `Attempt`, the values that are stored.
- `objective`: `Objective`, from the tasks' metrics to the number that a search maximizes, and ranks by it.
- `estimates`: means with standard errors, paired differences, control variates.
- `evaluator`, `task_set`: the protocols of what scores a live model, and several task sets as one.
- `python_tasks`: Python functions as tasks; `lm_harness`: lm-eval's tasks; `inference`: the forwards behind
  them.
- `perplexity_screen`: early rejection of routed models; `contamination`: items that training texts contain.

What this package exports loads no torch; `lm_harness`, `inference`, `python_tasks` and `perplexity_screen`
do.
"""

from __future__ import annotations

from evomerge.evaluation.evaluator import Answering, Differentiable, Evaluator, Preparing, Retaining
from evomerge.evaluation.objective import Objective, Standing, Term, missing_metric_message, ranks
from evomerge.evaluation.records import (
    FORWARDS_OF_A_SLOPE,
    ROLES,
    SOFT_METRICS,
    Answer,
    Attempt,
    Evaluation,
    GradientRequest,
    Items,
    ItemScore,
    Labels,
    Role,
    Slopes,
    Teacher,
    mean_metrics,
    soft_means,
    soft_metric_name,
    task_of_metric,
)
from evomerge.evaluation.task_set import CombinedTasks, TaskSet

__all__ = [
    "FORWARDS_OF_A_SLOPE",
    "ROLES",
    "SOFT_METRICS",
    "Answer",
    "Answering",
    "Attempt",
    "CombinedTasks",
    "Differentiable",
    "Evaluation",
    "Evaluator",
    "GradientRequest",
    "ItemScore",
    "Items",
    "Labels",
    "Objective",
    "Preparing",
    "Retaining",
    "Role",
    "Slopes",
    "Standing",
    "TaskSet",
    "Teacher",
    "Term",
    "mean_metrics",
    "missing_metric_message",
    "ranks",
    "soft_means",
    "soft_metric_name",
    "task_of_metric",
]
