"""From responses to values.

A task's own filters and `process_results`, cached where they depend on text alone; soft metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.lm_harness.task_loading import LoadedTask
from evomerge.evaluation.records import SOFT_METRICS

Rows = Sequence[tuple[str, list[Any]]]
"""(item id, its answered lm-eval requests) pairs."""


class TaskValues:
    """Computes the values of one task's metric.

    Generated texts that were seen before are not filtered and judged again.
    """

    def __init__(self, loaded: LoadedTask) -> None:
        """Prepares a task.

        Args:
            loaded: The task.
        """
        self._loaded = loaded
        steps = [step for ensemble in loaded.task._filters for step in ensemble.filters]
        # an ensemble holds partials of filter classes
        modules = {getattr(step, "func", step).__module__ for step in steps}
        # a filter of the user's may look across items, so that its answer is not of one text alone
        cacheable = loaded.task.OUTPUT_TYPE == "generate_until" and all(
            module.startswith("lm_eval.filters") for module in modules
        )
        self._cache: dict[tuple[str, tuple[Any, ...]], Any] | None = {} if cacheable else None

    def values(self, rows: Rows) -> list[Any]:
        """Computes the metric's value of each item.

        Args:
            rows: Items with answered requests.

        Returns:
            Values as lm-eval's aggregation takes them.

        Raises:
            CandidateError: The task's own code cannot judge an answer.
            TaskError: The task reports no such metric.
        """
        if self._cache is None:
            return self._judge(rows)
        keys = [
            (item, tuple(response for request in requests for response in request.resps))
            for item, requests in rows
        ]
        new = [i for i, key in enumerate(keys) if key not in self._cache]
        if new:
            for i, value in zip(new, self._judge([rows[i] for i in new]), strict=True):
                self._cache[keys[i]] = value
        return [self._cache[key] for key in keys]

    def filtered(self, rows: Rows) -> list[str | None]:
        """What the task's filter makes of each item's answer.

        Args:
            rows: Items with answered requests.

        Returns:
            The text of each item; None for a task that generates none.
        """
        loaded, task = self._loaded, self._loaded.task
        if task.OUTPUT_TYPE != "generate_until":
            return [None] * len(rows)
        task._instances = [request for _, requests in rows for request in requests]
        task.apply_filters()
        return [str(requests[0].filtered_resps[loaded.filter]) for _, requests in rows]

    def _judge(self, rows: Rows) -> list[Any]:
        loaded, task = self._loaded, self._loaded.task
        task._instances = [request for _, requests in rows for request in requests]
        results: list[dict[str, Any]] = []
        try:
            task.apply_filters()
            for _, requests in rows:
                responses = [request.filtered_resps[loaded.filter] for request in requests]
                results.append(task.process_results(requests[0].doc, responses))
        except Exception as error:  # filters and metrics are a task's own code and can raise anything
            raise CandidateError(
                f"task '{loaded.spec.task}' cannot judge an answer, after {len(results)} of {len(rows)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        values = []
        for (item, _), result in zip(rows, results, strict=True):
            if loaded.metric not in result and len(result) == 1 and task.config.process_results is None:
                result = {loaded.metric: next(iter(result.values()))}  # a metric that names its value itself
            if loaded.metric not in result:
                raise TaskError(
                    f"task '{loaded.spec.task}' reports no '{loaded.metric}' for item {item}; "
                    f"it reports {sorted(result)}"
                )
            values.append(result[loaded.metric])
        return values


_SHARE = "a share between 0 and 1"
_UNITS = {
    "perplexity": "a perplexity",
    "weighted_perplexity": "a perplexity",
    "bits_per_byte": "bits per byte",
    **dict.fromkeys(("bleu", "chrf", "ter"), "points out of 100"),
    "f1_score": _SHARE,
    "brier_score": _SHARE,
}
"""lm-eval's name of an aggregation -> what its values are counted in."""
_SHARES = {"acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match"}
"""lm-eval's metrics whose mean is a share."""


def metric_unit(metric: str, aggregate: Callable[[list[Any]], Any]) -> str | None:
    """Names what a metric is counted in.

    Args:
        metric: Its name.
        aggregate: Its aggregation over items.

    Returns:
        The unit; None for a metric that is not lm-eval's own.
    """
    name = getattr(aggregate, "__name__", "")
    return _SHARE if name == "mean" and metric in _SHARES else _UNITS.get(name)


def item_value(value: Any, aggregate: Callable[[list[Any]], Any]) -> float:
    """Makes one number of an item's value.

    Args:
        value: What `process_results` gives: a number; a (gold, predicted) pair, whose number is whether they
            agree; a (sum, count) pair, whose number is the ratio; or what the metric alone understands, such
            as a Brier score's (gold, probabilities).
        aggregate: The metric's own aggregation over items.

    Returns:
        The number; NaN where there is none.
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


def check_not_nan(loaded: LoadedTask, item: str, requests: Sequence[Any]) -> None:
    """Checks the responses of an item.

    Args:
        loaded: The task.
        item: The item's id.
        requests: Its answered requests.

    Raises:
        CandidateError: A log-likelihood is NaN.
    """
    for request in requests:
        for response in request.resps:
            value = response[0] if isinstance(response, tuple) else response
            if isinstance(value, float) and math.isnan(value):
                raise CandidateError(
                    f"the model gives NaN log-likelihoods in task '{loaded.spec.task}', item {item}"
                )


# ---- soft metrics ------------------------------------------------------------------------------------------

SoftScores = tuple[float | None, float | None]
"""(probability of the right answer in [0, 1], mean log-probability of its tokens in nats)."""


def soft_metrics(loaded: LoadedTask) -> tuple[str, ...]:
    """Lists the soft metrics that a task has.

    Args:
        loaded: The task.

    Returns:
        Some of `SOFT_METRICS`. A task of generated texts has them only with `TaskSpec.soft`.
    """
    kind = loaded.task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return ("logprob",)
    if kind in ("multiple_choice", "loglikelihood") or (kind == "generate_until" and loaded.spec.soft):
        return SOFT_METRICS
    return ()


def right_answer_requests(loaded: LoadedTask, requests: Sequence[Any]) -> list[Any]:
    """Builds log-likelihood requests of an item's right answers after its prompt, for generated texts.

    Args:
        loaded: The task.
        requests: The item's requests.

    Returns:
        lm-eval requests; none for other kinds of tasks, and without `TaskSpec.soft`.
    """
    from lm_eval.api.instance import Instance

    if loaded.task.OUTPUT_TYPE != "generate_until" or not loaded.spec.soft:
        return []
    task, first = loaded.task, requests[0]
    target = task.doc_to_target(first.doc)
    delimiter = task.config.target_delimiter
    answers = [str(answer) for answer in (target if isinstance(target, list) else [target])]
    texts = [answer if answer.startswith(delimiter) else f"{delimiter}{answer}" for answer in answers]
    return [
        Instance(
            request_type="loglikelihood",
            doc=first.doc,
            arguments=(first.args[0], text),
            idx=i,
            metadata=(loaded.spec.task, first.doc_id, 1),
        )
        for i, text in enumerate(texts)
    ]


def soft_scores(
    loaded: LoadedTask,
    requests: Sequence[Any],
    right_answers: Sequence[Any],
    count_tokens: Callable[[Any], int],
) -> SoftScores:
    """Computes the soft metrics of one item.

    Args:
        loaded: The task.
        requests: The item's answered requests.
        right_answers: Its answered `right_answer_requests`.
        count_tokens: Request -> number of tokens that it scores.

    Returns:
        Probability and log-probability. Of several right answers the probabilities add up among choices;
        elsewhere the likeliest counts.
    """
    kind = loaded.task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return None, float(requests[0].resps[0]) / count_tokens(requests[0])
    if kind == "multiple_choice":
        return _soft_scores_of_choices(loaded.task, requests, count_tokens)
    right = requests if kind == "loglikelihood" else right_answers
    if not right:
        return None, None
    best = max(right, key=lambda request: float(request.resps[0][0]))
    total = float(best.resps[0][0])
    return math.exp(min(0.0, total)), total / count_tokens(best)


def right_choices(task: Any, doc: Any) -> list[int]:
    """Returns which choices of a document are right.

    Args:
        task: lm-eval's task of multiple choice.
        doc: The document.

    Returns:
        Indices of choices.
    """
    options = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    indices = [
        options.index(right) if isinstance(right, str) and right in options else right
        for right in (target if isinstance(target, list) else [target])
    ]
    return [i for i in indices if isinstance(i, int) and 0 <= i < len(options)]


def _soft_scores_of_choices(
    task: Any, requests: Sequence[Any], count_tokens: Callable[[Any], int]
) -> SoftScores:
    right = right_choices(task, requests[0].doc)
    if not right:
        return None, None
    # requests beyond the choices ask for choices without context
    count = len(task.doc_to_choice(requests[0].doc))
    sums = [float(request.resps[0][0]) for request in requests[:count]]
    top = max(sums)
    weights = [math.exp(s - top) for s in sums]
    probability = math.fsum(weights[i] for i in right) / math.fsum(weights)
    best = max(right, key=lambda i: sums[i])
    return probability, sums[best] / count_tokens(requests[best])
