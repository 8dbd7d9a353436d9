"""Prompts of real tasks, as lm-eval builds them, for a model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading

REPO = Path(__file__).resolve().parents[2]


def prompts_of(model: Path, task: str, count: int, folder: Path = REPO / "evaluators") -> list[list[int]]:
    """Token ids of the first prompts of a task's test items.

    Args:
        model: Folder with the tokenizer.
        task: A task whose answers are generated.
        count: How many.
        folder: Where its YAML is.

    Returns:
        The prompts.
    """
    tokenizer = model_loading.load_tokenizer(Checkpoint(model))
    harness = LmHarness([TaskSpec(task, splits="declared")], tokenizer, include=[folder])
    items = harness.items("test")[task][:count]
    texts = [harness.tasks[task].requests[item][0].args[0] for item in items]
    return [tokenizer.encode(text) for text in texts]
