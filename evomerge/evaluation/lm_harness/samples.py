"""What a model said: prompt, right answer and output of an item, for people to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.evaluation.lm_harness.results import right_places
from evomerge.evaluation.lm_harness.task_loading import Loaded


@dataclass(frozen=True, slots=True)
class Option:
    """A choice of an item. probability: among the choices, in [0, 1]; right: whether it is a right answer; chosen: by the model."""

    text: str
    probability: float
    right: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One item as one model answered it. target: the right answer, '' where a task has none; output: the generated text, the
    text of the chosen option, or the log-likelihood in words; value: of the task's metric; options: of a multiple choice."""

    task: str
    item: str
    prompt: str
    target: str
    output: str
    value: float
    options: tuple[Option, ...] = ()


def sample(loaded: Loaded, item: str, requests: Sequence[Any], value: float) -> Sample:
    """The sample of an item whose lm-eval requests hold their responses."""
    task, first = loaded.task, requests[0]
    name, prompt = loaded.spec.task, str(first.args[0])
    kind = task.OUTPUT_TYPE
    if kind == "multiple_choice":
        options = _options(loaded, requests)
        if task.multiple_input:  # the contexts are the choices, and one continuation follows all
            prompt = str(first.args[1])
        right, chosen = (
            " | ".join(o.text for o in options if getattr(o, mark)) for mark in ("right", "chosen")
        )
        return Sample(name, item, prompt, right, chosen, value, options)
    if kind == "generate_until":
        return Sample(
            name,
            item,
            prompt,
            _text(task.doc_to_target(first.doc)),
            " | ".join(str(r) for r in first.resps),
            value,
        )
    if kind == "loglikelihood":
        total, greedy = first.resps[0]
        output = f"log-likelihood {float(total):.3f}{', the likeliest text' if greedy else ''}"
        return Sample(name, item, prompt, str(first.args[1]), output, value)
    return Sample(name, item, prompt, "", f"log-likelihood {float(first.resps[0]):.3f}", value)


def _options(loaded: Loaded, requests: Sequence[Any]) -> tuple[Option, ...]:
    task, doc = loaded.task, requests[0].doc
    texts = [str(choice) for choice in task.doc_to_choice(doc)]
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = [
        texts.index(t) if isinstance(t, str) and t in texts else t
        for t in (target if isinstance(target, list) else [target])
    ]
    sums = [
        float(request.resps[0][0]) for request in requests[: len(texts)]
    ]  # what follows asks for choices without context
    lengths = {"acc_norm": [len(t) for t in texts], "acc_bytes": [len(t.encode()) for t in texts]}.get(
        loaded.metric, [1] * len(texts)
    )
    marks = [s / max(1, n) for s, n in zip(sums, lengths, strict=True)]
    weights = [math.exp(s - max(sums)) for s in sums]
    total, best = math.fsum(weights), marks.index(max(marks))
    return tuple(
        Option(text, w / total, at in right, at == best)
        for at, (text, w) in enumerate(zip(texts, weights, strict=True))
    )


def _text(target: Any) -> str:
    return " | ".join(str(t) for t in target) if isinstance(target, list) else str(target)


def passage(loaded: Loaded, requests: Sequence[Any]) -> tuple[str, str]:
    """(prompt, right answer) of an item; a text without a prompt is all answer, an item without a right answer all prompt."""
    task, first = loaded.task, requests[0]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", str(first.args[0])
    if task.OUTPUT_TYPE == "loglikelihood":
        return str(first.args[0]), str(first.args[1])
    if task.OUTPUT_TYPE == "multiple_choice":
        right = right_places(task, first.doc)
        return (
            (str(requests[right[0]].args[0]), str(requests[right[0]].args[1]))
            if right
            else (str(first.args[0]), "")
        )
    target = task.doc_to_target(first.doc)
    answer = str((target[0] if target else "") if isinstance(target, list) else target)
    delimiter = str(task.config.target_delimiter or "")
    return str(first.args[0]), answer if answer.startswith(delimiter) else delimiter + answer
