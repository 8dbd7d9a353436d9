"""The text of an item with its right answer: what a model that is not broken finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.lm_harness.outcomes import right_places
from evomerge.lm_harness.tasks import Loaded


def passage(loaded: Loaded, requests: Sequence[Any]) -> tuple[str, str]:
    """(prompt, right answer) of an item; a text without a prompt is all answer, an item without a right answer all prompt."""
    task, first = loaded.task, requests[0]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", str(first.args[0])
    if task.OUTPUT_TYPE == "loglikelihood":
        return str(first.args[0]), str(first.args[1])
    if task.OUTPUT_TYPE == "multiple_choice":
        right = right_places(task, first.doc)
        return (str(requests[right[0]].args[0]), str(requests[right[0]].args[1])) if right else (str(first.args[0]), "")
    target = task.doc_to_target(first.doc)
    answer = str((target[0] if target else "") if isinstance(target, list) else target)
    delimiter = str(task.config.target_delimiter or "")
    return str(first.args[0]), answer if answer.startswith(delimiter) else delimiter + answer
