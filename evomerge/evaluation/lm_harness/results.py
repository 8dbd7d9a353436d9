"""Responses -> values: a task's own filters and `process_results`, remembered where they depend on text alone; soft scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.lm_harness.task_loading import Loaded

Rows = Sequence[tuple[str, list[Any]]]
"""(item id, its lm-eval requests, answered)."""


def remember_documents(task: Any) -> None:
    """Makes a task render each document's choices and target once: they depend on the document alone."""
    for name in ("doc_to_choice", "doc_to_target"):
        if callable(getattr(task, name, None)):
            setattr(task, name, _once(getattr(task, name)))


def _once(render: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[int, tuple[Any, Any]] = {}

    def rendered(doc: Any, *more: Any, **named: Any) -> Any:
        if more or named:
            return render(doc, *more, **named)
        found = known.get(id(doc))
        if found is None or found[0] is not doc:
            found = known[id(doc)] = (doc, render(doc))
        return found[1]

    return rendered


class Outcomes:
    """The values of one task's metric. Texts that were seen before are not filtered and judged again."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        steps = [step for ensemble in loaded.task._filters for step in ensemble.filters]
        modules = {
            getattr(step, "func", step).__module__ for step in steps
        }  # an ensemble holds partials of filter classes
        own = all(
            module.startswith("lm_eval.filters") for module in modules
        )  # one of the user's may look across items
        self._known: dict[tuple[str, tuple[Any, ...]], Any] | None = (
            {} if loaded.task.OUTPUT_TYPE == "generate_until" and own else None
        )

    def values(self, rows: Rows) -> list[Any]:
        """The metric's value of each item, as lm-eval's aggregation takes it. Raises TaskError where the task reports none."""
        if self._known is None:
            return self._judge(rows)
        keys = [
            (item, tuple(answer for request in requests for answer in request.resps))
            for item, requests in rows
        ]
        new = [at for at, key in enumerate(keys) if key not in self._known]
        if new:
            for at, value in zip(new, self._judge([rows[at] for at in new]), strict=True):
                self._known[keys[at]] = value
        return [self._known[key] for key in keys]

    def _judge(self, rows: Rows) -> list[Any]:
        loaded, task = self._loaded, self._loaded.task
        task._instances = [request for _, requests in rows for request in requests]
        outcomes: list[dict[str, Any]] = []
        try:
            task.apply_filters()
            for _, requests in rows:
                outcomes.append(
                    task.process_results(
                        requests[0].doc, [request.filtered_resps[loaded.filter] for request in requests]
                    )
                )
        except Exception as error:  # filters and metrics are a task's own code and can raise anything
            raise CandidateError(
                f"task '{loaded.spec.task}' cannot judge an answer, after {len(outcomes)} of {len(rows)}: {type(error).__name__}: {error}"
            ) from error
        values = []
        for (item, _), outcome in zip(rows, outcomes, strict=True):
            if loaded.metric not in outcome:
                raise TaskError(
                    f"task '{loaded.spec.task}' reports no '{loaded.metric}' for item {item}; it reports {sorted(outcome)}"
                )
            values.append(outcome[loaded.metric])
        return values


def number(value: Any, aggregate: Callable[[list[Any]], Any]) -> float:
    """One number for an item's value: itself; whether a (gold, predicted) pair agrees; a (sum, count) pair's ratio.

    aggregate: the metric's own over items, for what is none of these, such as a Brier score's (gold, probabilities).
    """
    try:
        if isinstance(value, tuple) and len(value) == 2:
            first, second = value
            if hasattr(second, "__len__") and not isinstance(second, str):
                return float(aggregate([value]))
            if isinstance(first, float) and second:
                return first / float(second)
            return float(bool(first == second))
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def check(loaded: Loaded, item: str, requests: Sequence[Any]) -> None:
    """Raises CandidateError for a log-likelihood that is NaN."""
    for request in requests:
        for answer in request.resps:
            found = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(found, float) and math.isnan(found):
                raise CandidateError(
                    f"the model gives NaN log-likelihoods in task '{loaded.spec.task}', item {item}"
                )


# ---- soft scores ---------------------------------------------------------------------------------------------------------

Soft = tuple[float | None, float | None]
"""(probability of the right answer in [0, 1], mean log-probability of its tokens in nats)."""


def measures(loaded: Loaded) -> tuple[str, ...]:
    """Which soft scores a task has: of 'probability' and 'logprob'."""
    kind = loaded.task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return ("logprob",)
    if kind == "generate_until" and not loaded.spec.soft:
        return ()
    return (
        ("probability", "logprob") if kind in ("multiple_choice", "loglikelihood", "generate_until") else ()
    )


def gold_requests(loaded: Loaded, requests: Sequence[Any]) -> list[Any]:
    """For an item of generated text: log-likelihood requests of its right answers after the same prompt."""
    from lm_eval.api.instance import Instance

    if loaded.task.OUTPUT_TYPE != "generate_until" or not loaded.spec.soft:
        return []
    task, first = loaded.task, requests[0]
    target = task.doc_to_target(first.doc)
    delimiter = task.config.target_delimiter
    texts = [
        f"{delimiter}{t}" if not str(t).startswith(delimiter) else str(t)
        for t in (target if isinstance(target, list) else [target])
    ]
    return [
        Instance(
            request_type="loglikelihood",
            doc=first.doc,
            arguments=(first.args[0], text),
            idx=at,
            metadata=(loaded.spec.task, first.doc_id, 1),
        )
        for at, text in enumerate(texts)
    ]


def soft(loaded: Loaded, requests: Sequence[Any], gold: Sequence[Any], tokens: Callable[[Any], int]) -> Soft:
    """The soft scores of one item. gold: the answered `gold_requests`; tokens: how many tokens of a request are scored.

    Of several right answers the probabilities add up among choices, and the likeliest counts elsewhere.
    """
    kind = loaded.task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return None, float(requests[0].resps[0]) / tokens(requests[0])
    if kind == "multiple_choice":
        return _of_choices(loaded.task, requests, tokens)
    right = requests if kind == "loglikelihood" else gold
    if not right:
        return None, None
    best = max(right, key=lambda request: float(request.resps[0][0]))
    total = float(best.resps[0][0])
    return math.exp(min(0.0, total)), total / tokens(best)


def right_places(task: Any, doc: Any) -> list[int]:
    """Which choices of a document are right, by number."""
    options = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    places = [
        options.index(t) if isinstance(t, str) and t in options else t
        for t in (target if isinstance(target, list) else [target])
    ]
    return [place for place in places if isinstance(place, int) and 0 <= place < len(options)]


def _of_choices(task: Any, requests: Sequence[Any], tokens: Callable[[Any], int]) -> Soft:
    right = right_places(task, requests[0].doc)
    if not right:
        return None, None
    sums = [
        float(request.resps[0][0]) for request in requests[: len(task.doc_to_choice(requests[0].doc))]
    ]  # what follows asks for choices without context
    top = max(sums)
    weights = [math.exp(s - top) for s in sums]
    best = max(right, key=lambda place: sums[place])
    return math.fsum(weights[place] for place in right) / math.fsum(weights), sums[best] / tokens(
        requests[best]
    )
