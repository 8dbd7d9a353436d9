"""Items of tasks scored by evomerge and by lm-eval's command line on the same folder, one by one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging.model_loading import load_model
from scripts.validation import lm_eval_command


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task: how many items were scored, in how many the values differ, both means, our seconds.

    texts: How many texts were generated; other_texts: those that are not lm-eval's.
    """

    task: str
    metric: str
    items: int
    differ: int
    ours: float
    theirs: float
    seconds: float
    texts: int
    other_texts: int


def compare(
    folder: Path, dtype: str, counts: Mapping[str, int], include: Path, scratch: Path
) -> list[TaskRow]:
    """Scores the first test items of tasks both ways. counts: task -> how many items."""
    numbers = {task: range(count) for task, count in counts.items()}
    lm_eval_command.run(folder, dtype, numbers, include, scratch)
    model = load_model(folder, dtype).model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [_row(model, tokenizer, task, rows, include, scratch) for task, rows in numbers.items()]


def _row(model: Any, tokenizer: Any, task: str, numbers: range, include: Path, scratch: Path) -> TaskRow:
    spec = TaskSpec(task, splits=splits_of(task, include), items={"test": list(numbers)})
    limits = {"search": 2, "validation": 2}
    harness = LmHarness([spec], tokenizer, batch_size=1, include=[include], limits=limits)
    loaded = harness.tasks[task]
    started = time.process_time()
    scores, means = harness.score(model, harness.items("test"))
    seconds = time.process_time() - started
    theirs = lm_eval_command.values(scratch, task, loaded.metric, loaded.filter)
    ours = {score.item: score.value for score in scores}
    if ours.keys() != theirs.keys():
        raise AssertionError(f"{task}: other items, {sorted(ours.keys() ^ theirs.keys())}")
    differ = sum(ours[item] != theirs[item] for item in ours)
    mean = sum(theirs.values()) / len(theirs)
    logged = lm_eval_command.texts(scratch, task)
    texts = {item: loaded.requests[item][0].resps[0] for item in logged}  # they are shown nowhere else
    other = sum(texts[item] != logged[item] for item in logged)
    return TaskRow(task, loaded.metric, len(ours), differ, means[task], mean, seconds, len(texts), other)


def splits_of(task: str, include: Path) -> str:
    """How the search takes a task's items: 'validation' where it has no training split."""
    file = next(include.rglob(f"{task}.yaml"))
    config = yaml.safe_load(file.read_text())
    return "declared" if "training_split" in config else "validation"
