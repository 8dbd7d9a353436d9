"""Answers of models to lm-eval items, which may stand for the right ones, and checks of the right ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.lm_harness.backends.base import Backend
from evomerge.evaluation.lm_harness.results import TaskValues, item_value
from evomerge.evaluation.lm_harness.task_loading import LoadedTask
from evomerge.evaluation.records import GOLD, LEFT_OUT, SAMPLES, Answer

_LENGTH = 256  # tokens that lm-eval generates at most where a task does not say
_SPARE = 16  # tokens that an answer may be longer than the text of a log-likelihood task, to end by itself
_CHECKED = 3  # items whose right answers are judged
_REASONING = 32  # tokens of an answer that may hold reasoning

Count = Callable[[str], int]
"""Text -> number of its tokens."""


def given_answers(
    backend: Backend, rows: Sequence[tuple[LoadedTask, Sequence[Any]]], end: str, count: Count
) -> tuple[Answer | None, ...]:
    """Reads what a model answered to items, and asks for its own texts where a task gave one.

    Args:
        backend: Wraps the model.
        rows: (task, answered requests) of each item.
        end: Text of the tokenizer's end-of-sequence token; '' for none.
        count: Counts tokens.

    Returns:
        Of each item the generated text, or the number of the likeliest choice; None for an empty text, and
        for one that was cut off by its length.
    """
    asked = [requests[0] for _, requests in rows]
    texts = [i for i, (loaded, _) in enumerate(rows) if loaded.task.OUTPUT_TYPE == "loglikelihood"]
    for i in texts:
        asked[i] = _continuation(rows[i][0], asked[i], end, count)
    if texts:
        prepared = backend.prepare([asked[i] for i in texts])
        for i, responses in zip(texts, backend.answer(prepared, "model"), strict=True):
            asked[i].resps = responses
    return tuple(
        _given_answer(loaded, requests, request, end, count)
        for (loaded, requests), request in zip(rows, asked, strict=True)
    )


def _continuation(loaded: LoadedTask, request: Any, end: str, count: Count) -> Any:
    """A request of a model's own text in place of that of a log-likelihood task.

    It is as long as the task's text, or ends by itself where that ends with the end token.
    """
    from lm_eval.api.instance import Instance

    context, text = request.args
    length = count(str(text)) + (_SPARE if _ends(str(text), end) else 0)
    return Instance(
        request_type="generate_until",
        doc=request.doc,
        arguments=(context, {"until": [], "do_sample": False, "max_gen_toks": max(1, length)}),
        idx=0,
        metadata=(loaded.spec.task, request.doc_id, 1),
    )


def _given_answer(
    loaded: LoadedTask, requests: Sequence[Any], answered: Any, end: str, count: Count
) -> Answer | None:
    """The answer to an item. answered: the request of its text."""
    kind = loaded.task.OUTPUT_TYPE
    if kind == "multiple_choice":
        # requests beyond the choices ask for choices without context
        choices = loaded.task.doc_to_choice(requests[0].doc)
        sums = [float(request.resps[0][0]) for request in requests[: len(choices)]]
        return sums.index(max(sums))
    text = str(answered.resps[0])
    if not text.strip():
        return None
    if kind == "loglikelihood" and not _ends(str(requests[0].args[1]), end):
        return text  # as long as the task's own
    if count(text) >= int(answered.args[1].get("max_gen_toks") or _LENGTH):
        return None
    return text + end if kind == "loglikelihood" else text


def check_source(loaded: LoadedTask, source: str, end: str) -> tuple[str, ...]:
    """Checks that a task can be learned from labels, in so far as its first search items show.

    Args:
        loaded: The task.
        source: Whose answers stand for the right ones, see `evomerge.search.labels`.
        end: Text of the tokenizer's end-of-sequence token; '' for none.

    Returns:
        Sentences that a user should read.

    Raises:
        TaskError: The task has no answers of that kind.
    """
    from evomerge.evaluation.lm_harness.gradients import text_item

    name, kind = loaded.spec.task, loaded.task.OUTPUT_TYPE
    if source == LEFT_OUT:
        return ()
    if source == GOLD:
        for item in loaded.items["search"][:1]:
            text_item(loaded, item, loaded.requests[item], end)
        return _check_gold(loaded) if kind == "generate_until" else ()
    if kind == "loglikelihood_rolling":
        raise TaskError(
            f"task '{name}' asks how likely a text is, which no model answers; write labels: "
            f"{{{name}: {GOLD}}} or leave it out with {LEFT_OUT}"
        )
    if source == SAMPLES and kind != "generate_until":
        raise TaskError(
            f"task '{name}' knows its right answers as texts, so it needs no samples; write labels: "
            f"{{{name}: {GOLD}}}, or a model's name"
        )
    return ()


def _check_gold(loaded: LoadedTask) -> tuple[str, ...]:
    """Judges right answers as if a model had generated them."""
    items = loaded.items["search"][:_CHECKED]
    if not loaded.higher_is_better or _aggregation(loaded) != "mean":
        return ()
    name = loaded.spec.task
    texts = [_as_generated(loaded, loaded.requests[item][0]) for item in items]
    rows = [
        (item, [_answered(loaded.requests[item][0], form)])
        for item, text in zip(items, texts, strict=True)
        for form in (text, text.strip())  # tokenizers differ in the space before a first word
    ]
    judge = TaskValues(loaded)
    try:
        values = [item_value(value, max) for value in judge.values(rows)]
        filtered = judge.filtered(rows)[::2]
    except (CandidateError, TypeError, AttributeError):  # what judges answers does not take these
        values, filtered = [0.0], []
    if values and not any(values):
        raise TaskError(
            f"task '{name}': its metric '{loaded.metric}' would find its right answer wrong from a model "
            f"({texts[0].strip()[:40]!r}, item {items[0]}), so a learned stage has nothing to climb; write "
            f"labels: {{{name}: {SAMPLES}}} for right answers of the models, or a model's name, or search "
            "weights instead"
        )
    limit = int(loaded.requests[items[0]][0].args[1].get("max_gen_toks") or _LENGTH)
    is_final = all(text.strip() == found for text, found in zip(texts, filtered, strict=False))
    if is_final and _extracts(loaded) and limit > _REASONING:
        return (
            f"task '{name}': its right answers are final answers ({texts[0].strip()[:20]!r}), and its filter "
            f"'{loaded.filter}' finds those in texts of up to {limit} tokens; if the models reason before "
            f"they answer, a learned stage climbs the wrong texts, so write labels: {{{name}: {SAMPLES}}}",
        )
    return ()


def _answered(request: Any, text: str) -> Any:
    """A copy of a request with a response."""
    copied = copy.copy(request)
    copied.resps, copied.filtered_resps = [text], {}
    return copied


def _as_generated(loaded: LoadedTask, request: Any) -> str:
    """The first right answer of an item as a model would generate it: cut at the first stop string."""
    target = loaded.task.doc_to_target(request.doc)
    answer = str(target[0] if isinstance(target, list) and target else target)
    delimiter = str(loaded.task.config.target_delimiter or "")
    text = answer if answer.startswith(delimiter) else f"{delimiter}{answer}"
    until = request.args[1].get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def _extracts(loaded: LoadedTask) -> bool:
    """Whether the task's filter takes an answer out of a longer text."""
    steps = [step for e in loaded.task._filters if e.name == loaded.filter for step in e.filters]
    # an ensemble holds partials of filter classes
    return any(
        "Regex" in getattr(getattr(step, "func", step), "__name__", type(step).__name__) for step in steps
    )


def _aggregation(loaded: LoadedTask) -> str:
    return str(getattr(loaded.task.aggregation()[loaded.metric], "__name__", ""))


def _ends(text: str, end: str) -> bool:
    return bool(end) and text.endswith(end)
