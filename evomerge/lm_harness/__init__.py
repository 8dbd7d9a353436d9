"""lm-eval tasks as an `Evaluator`. The only room that imports lm_eval."""

from evomerge.lm_harness.harness import LmHarness
from evomerge.lm_harness.items import Rules
from evomerge.lm_harness.tasks import TaskSpec

__all__ = ["LmHarness", "Rules", "TaskSpec"]
