"""lm-eval tasks as an `Evaluator`. The only package that imports lm_eval."""

from __future__ import annotations

from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.items import ItemRules
from evomerge.evaluation.lm_harness.task_loading import TaskSpec

__all__ = ["ItemRules", "LmHarness", "TaskSpec"]
