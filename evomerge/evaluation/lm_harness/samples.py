"""Samples of what a model answers: prompt, right answer and output of an item, for people to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.evaluation.lm_harness.results import right_choices
from evomerge.evaluation.lm_harness.task_loading import LoadedTask


@dataclass(frozen=True, slots=True)
class Option:
    """A choice of an item.

    Attributes:
        text: The choice.
        probability: Among the choices, in [0, 1].
        right: Whether it is a right answer.
        chosen: Whether the model chose it.
    """

    text: str
    probability: float
    right: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One item as one model answered it.

    Attributes:
        task: Name of the task.
        item: Id of the item.
        prompt: The prompt.
        target: The right answer; '' where a task has none.
        output: The generated text, the text of the chosen option, or the log-likelihood in words.
        value: Of the task's metric.
        options: Of a multiple choice.
        filter: Name of the task's filter.
        filtered: What the filter made of a generated text; None for other kinds of tasks.
    """

    task: str
    item: str
    prompt: str
    target: str
    output: str
    value: float
    options: tuple[Option, ...] = ()
    filter: str = ""
    filtered: str | None = None


def sample(
    loaded: LoadedTask, item: str, requests: Sequence[Any], value: float, filtered: str | None = None
) -> Sample:
    """Describes how an item was answered.

    Args:
        loaded: The task.
        item: Id of the item.
        requests: Its lm-eval requests with their responses.
        value: Its value of the task's metric.
        filtered: What the task's filter made of its generated text.

    Returns:
        The sample.
    """
    task, first = loaded.task, requests[0]
    name, prompt = loaded.spec.task, str(first.args[0])
    kind = task.OUTPUT_TYPE
    if kind == "multiple_choice":
        options = _options(loaded, requests)
        if task.multiple_input:  # the contexts are the choices, and one continuation follows all
            prompt = str(first.args[1])
        right = " | ".join(option.text for option in options if option.right)
        chosen = " | ".join(option.text for option in options if option.chosen)
        return Sample(name, item, prompt, right, chosen, value, options)
    if kind == "generate_until":
        output = " | ".join(str(response) for response in first.resps)
        target = _joined(task.doc_to_target(first.doc))
        return Sample(name, item, prompt, target, output, value, (), loaded.filter, filtered)
    if kind == "loglikelihood":
        total, greedy = first.resps[0]
        output = f"log-likelihood {float(total):.3f}{', the likeliest text' if greedy else ''}"
        return Sample(name, item, prompt, str(first.args[1]), output, value)
    return Sample(name, item, prompt, "", f"log-likelihood {float(first.resps[0]):.3f}", value)


def _options(loaded: LoadedTask, requests: Sequence[Any]) -> tuple[Option, ...]:
    task, doc = loaded.task, requests[0].doc
    texts = [str(choice) for choice in task.doc_to_choice(doc)]
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = [
        texts.index(answer) if isinstance(answer, str) and answer in texts else answer
        for answer in (target if isinstance(target, list) else [target])
    ]
    # requests beyond the choices ask for choices without context
    sums = [float(request.resps[0][0]) for request in requests[: len(texts)]]
    lengths = [1] * len(texts)
    if loaded.metric == "acc_norm":
        lengths = [len(text) for text in texts]
    elif loaded.metric == "acc_bytes":
        lengths = [len(text.encode()) for text in texts]
    scores = [s / max(1, n) for s, n in zip(sums, lengths, strict=True)]
    weights = [math.exp(s - max(sums)) for s in sums]
    total, best = math.fsum(weights), scores.index(max(scores))
    return tuple(
        Option(text, weight / total, i in right, i == best)
        for i, (text, weight) in enumerate(zip(texts, weights, strict=True))
    )


def _joined(target: Any) -> str:
    return " | ".join(str(answer) for answer in target) if isinstance(target, list) else str(target)


def example(loaded: LoadedTask, requests: Sequence[Any]) -> tuple[str, str]:
    """Returns an item's prompt and right answer, for the perplexity screen.

    Args:
        loaded: The task.
        requests: The item's lm-eval requests.

    Returns:
        (prompt, right answer). A text without a prompt is all answer, an item without a right answer all
        prompt.
    """
    task, first = loaded.task, requests[0]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", str(first.args[0])
    if task.OUTPUT_TYPE == "loglikelihood":
        return str(first.args[0]), str(first.args[1])
    if task.OUTPUT_TYPE == "multiple_choice":
        right = right_choices(task, first.doc)
        if not right:
            return str(first.args[0]), ""
        request = requests[right[0]]
        return str(request.args[0]), str(request.args[1])
    target = task.doc_to_target(first.doc)
    if isinstance(target, list):
        target = target[0] if target else ""
    answer = str(target)
    delimiter = str(task.config.target_delimiter or "")
    return str(first.args[0]), answer if answer.startswith(delimiter) else delimiter + answer
