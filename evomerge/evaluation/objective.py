"""The objective of a search: from the tasks' metrics to the number that is maximized, and ranks by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import ConfigError
from evomerge.evaluation.records import Evaluation, ItemScore, soft_metric_name

MetricKind = Literal["metric", "probability", "logprob"]
"""What of a task the search may rank by: its own metric, or a soft metric of the right answer."""


@dataclass(frozen=True, slots=True)
class Term:
    """A task's part in the objective.

    Attributes:
        task: Name of the task or group.
        weight: Weight among the terms, above 0; only ratios of weights count.
        sign: +1, or -1 for metrics where lower is better, such as perplexity.
        search: (metric kind, share) pairs of what the search ranks by instead of the metric, shares above 0.
        subtasks: (task, share) pairs of a group whose items are those of other tasks, shares summing to one;
            empty for a task with items of its own.
        mean: Whether the task's metric is the mean of its items' values. Only then it has a standard error,
            and only then candidates can be raced on it.
    """

    task: str
    weight: float = 1.0
    sign: int = 1
    search: tuple[tuple[MetricKind, float], ...] = (("metric", 1.0),)
    subtasks: tuple[tuple[str, float], ...] = ()
    mean: bool = True

    @property
    def strata(self) -> tuple[tuple[str, float], ...]:
        """(task, share) pairs of the tasks whose items are scored, shares summing to one."""
        return self.subtasks or ((self.task, 1.0),)

    def value(self, metrics: Mapping[str, float], kind: MetricKind = "metric") -> float:
        """Computes the task's value by one kind of metric.

        Args:
            metrics: Metrics of a candidate, as in `Evaluation.metrics`.
            kind: The task's own metric, or a soft metric.

        Returns:
            The value, higher is better. A group's own metric comes before the weighted mean of its subtasks.

        Raises:
            ConfigError: The metrics hold no such value of the task.
        """
        if kind == "metric" and self.task in metrics:
            return self.sign * metrics[self.task]
        names = [
            (task if kind == "metric" else soft_metric_name(task, kind), share) for task, share in self.strata
        ]
        if any(name not in metrics for name, _ in names):
            raise ConfigError(missing_metric_message(self.task, kind))
        sign = self.sign if kind == "metric" else 1
        return sign * math.fsum(share * metrics[name] for name, share in names)

    def search_value(self, metrics: Mapping[str, float]) -> float:
        """Computes the task's value that the search ranks by.

        Args:
            metrics: Metrics of a candidate.

        Returns:
            Weighted mean of the values by the kinds in `search`, higher is better.

        Raises:
            ConfigError: The metrics lack a soft metric that this needs.
        """
        total = math.fsum(share for _, share in self.search)
        return math.fsum(share * self.value(metrics, kind) for kind, share in self.search) / total

    def item_search_value(self, score: ItemScore) -> float | None:
        """Computes one item's value that the search ranks by.

        Args:
            score: The item's score.

        Returns:
            Weighted mean by the kinds in `search`, higher is better; None for an item without a soft metric
            that this needs.
        """
        by_kind = {
            "metric": self.sign * score.value,
            "probability": score.probability,
            "logprob": score.logprob,
        }
        weighted = []
        for kind, share in self.search:
            value = by_kind[kind]
            if value is None:
                return None
            weighted.append((share, value))
        return math.fsum(share * value for share, value in weighted) / math.fsum(
            share for share, _ in weighted
        )


def missing_metric_message(task: str, kind: str) -> str:
    """Words the error for a task that lacks a kind of metric.

    Args:
        task: Name of the task.
        kind: The `MetricKind` that it lacks.

    Returns:
        A sentence that says what is missing and what to do.
    """
    return (
        f"task '{task}' gives no {kind} of a right answer, which the search was asked to use; "
        "let it search by the metric"
    )


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search maximizes: the tasks' weighted mean, their weighted geometric mean, or the worst of them.

    The reported number is always made of the tasks' own metrics. What the search ranks by is another one
    where terms say so (soft metrics), less the penalty for size.

        objective = Objective((Term("gsm8k", weight=2.0), Term("wikitext", sign=-1)))
        objective({"gsm8k": 0.41, "wikitext": 12.3})

    Attributes:
        terms: The tasks, at least one.
        kind: 'mean'; 'geometric', which is 0, the lowest it can be, where a value is at or below 0; or
            'worst'.
        keep: (task, x) pairs, the retention constraint: a candidate must be at least as good there as the
            best parent less x.
        tie_break: Soft metric that decides between equal scores. It changes ranks, never a score.
        layer_price: What each layer beyond `depth` costs, in units of the objective. It changes ranks and is
            not in what is reported.
        depth: Number of layers that cost nothing.
    """

    terms: tuple[Term, ...]
    kind: Literal["mean", "geometric", "worst"] = "mean"
    keep: tuple[tuple[str, float], ...] = ()
    tie_break: Literal["probability", "logprob", "none"] = "none"
    layer_price: float = 0.0
    depth: int = 0

    def __post_init__(self) -> None:
        if not self.terms or any(term.weight <= 0 for term in self.terms):
            raise ConfigError("an objective needs at least one task, each with a weight above 0")
        for term in self.terms:
            self._check_term(term)
        for task, _ in self.keep:
            if not self._term(task).mean:
                raise ConfigError(
                    f"'keep' compares means of items, and the metric of task '{task}' is no mean; "
                    "leave it out of 'keep'"
                )

    def _check_term(self, term: Term) -> None:
        if not term.search or any(share <= 0 for _, share in term.search):
            raise ConfigError(
                f"task '{term.task}' needs shares above 0 of what the search sees, got {dict(term.search)}"
            )
        if self.kind == "geometric" and (term.sign < 0 or "logprob" in dict(term.search)):
            reason = "a metric where lower is better" if term.sign < 0 else "a log-probability"
            raise ConfigError(
                f"a geometric mean needs values above 0, and task '{term.task}' is scored by {reason}; "
                "choose 'mean' or 'worst'"
            )

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """Computes the objective by the tasks' metrics.

        Args:
            metrics: Metrics of a candidate.

        Returns:
            The objective, higher is better; NaN if a task's value is not finite.
        """
        return self._combined([term.value(metrics) for term in self.terms])

    def reported_score(self, evaluation: Evaluation) -> float | None:
        """Computes the objective of an evaluation, as it is reported.

        Args:
            evaluation: A candidate's evaluation.

        Returns:
            The objective; None for a candidate that failed, or whose objective is not finite.
        """
        if evaluation.error is not None:
            return None
        score = self(evaluation.metrics)
        return score if math.isfinite(score) else None

    def search_score(self, metrics: Mapping[str, float]) -> float:
        """Computes the objective that the search ranks by, before the penalty for size.

        Args:
            metrics: Metrics of a candidate.

        Returns:
            The objective over the terms' `search_value`, higher is better; NaN if a value is not finite.

        Raises:
            ConfigError: The metrics lack a soft metric that this needs.
        """
        return self._combined([term.search_value(metrics) for term in self.terms])

    def size_penalty(self, costs: Mapping[str, float]) -> float:
        """Computes what a candidate's layers beyond `depth` cost.

        Args:
            costs: Costs of a candidate, as in `Evaluation.costs`; without 'layers' nothing is charged.

        Returns:
            A number at or above 0, to be subtracted from the score.
        """
        return self.layer_price * max(0.0, costs.get("layers", self.depth) - self.depth)

    def tie_break_score(self, metrics: Mapping[str, float]) -> float:
        """Computes what decides between equal scores.

        Args:
            metrics: Metrics of a candidate.

        Returns:
            Weighted mean of the soft metric `tie_break` over the tasks that have it; 0 if none has.
        """
        if self.tie_break == "none":
            return 0.0
        terms = [
            term
            for term in self.terms
            if all(soft_metric_name(task, self.tie_break) in metrics for task, _ in term.strata)
        ]
        if not terms:
            return 0.0
        total = math.fsum(term.weight for term in terms)
        return math.fsum(term.weight * term.value(metrics, self.tie_break) for term in terms) / total

    def floors(self, parent: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Computes the values that the retention constraint demands.

        Args:
            parent: Task -> metrics of its best parent on the candidate's items.

        Returns:
            Task of `keep` -> the lowest value allowed, for the tasks in `parent`.
        """
        return {
            task: self._term(task).value(parent[task]) - slack for task, slack in self.keep if task in parent
        }

    def violation(self, metrics: Mapping[str, float], floors: Mapping[str, float]) -> float:
        """Computes by how much a candidate violates the retention constraint.

        Args:
            metrics: Metrics of a candidate.
            floors: Result of `floors` for the same items.

        Returns:
            Sum over tasks of how far each falls below its floor; 0 for a candidate that keeps them all.
        """
        return math.fsum(max(0.0, floor - self._term(task).value(metrics)) for task, floor in floors.items())

    def shares(self, metrics: Mapping[str, float] | None = None) -> dict[str, float]:
        """Computes the derivative of the objective by each task's metric.

        Args:
            metrics: Where to differentiate (delta method); may be None for a mean, whose derivative is
                constant.

        Returns:
            Task with items -> its signed share. The absolute values sum to one for a mean. Of a geometric
            mean that is 0, and of the tasks that are not the worst, the shares are 0.

        Raises:
            ValueError: `metrics` is None and the objective is no mean.
        """
        out: dict[str, float] = {}
        for term, slope in zip(self.terms, self._slopes(metrics), strict=True):
            for task, share in term.strata:
                out[task] = out.get(task, 0.0) + slope * term.sign * share
        return out

    def _slopes(self, metrics: Mapping[str, float] | None) -> list[float]:
        """Derivatives of the objective by the terms' values."""
        total = math.fsum(term.weight for term in self.terms)
        weights = [term.weight / total for term in self.terms]
        if self.kind == "mean":
            return weights
        if metrics is None:
            raise ValueError(f"the shares of a '{self.kind}' objective depend on the metrics")
        values = [term.value(metrics) for term in self.terms]
        combined = self._combined(values)
        if self.kind == "geometric":
            return [w * combined / v if v > 0 else 0.0 for w, v in zip(weights, values, strict=True)]
        worst = values.index(combined)
        return [float(i == worst) for i in range(len(values))]

    def search_items(self, items: Sequence[ItemScore]) -> tuple[ItemScore, ...]:
        """Replaces the items' values by those that the search ranks by.

        Args:
            items: Scores of items; those of other tasks are left out.

        Returns:
            The items with their `Term.item_search_value`, higher is better, to be averaged with
            `search_shares`. An item without the soft metric that its task is searched by, such as one without
            a right answer, is left out.
        """
        terms = {task: term for term in self.terms for task, _ in term.strata}
        values = [
            (score, terms[score.task].item_search_value(score)) for score in items if score.task in terms
        ]
        return tuple(replace(score, value=value) for score, value in values if value is not None)

    @property
    def search_shares(self) -> dict[str, float]:
        """Task with items -> its share in a mean objective over `search_items`; they sum to one."""
        return {task: abs(share) for task, share in Objective(self.terms).shares().items()}

    @property
    def is_mean_of_items(self) -> bool:
        """Whether it is a weighted mean of item values, so that it has paired errors and can be raced."""
        return self.kind == "mean" and all(term.mean for term in self.terms)

    def task_values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Computes the coordinates that a Pareto front compares.

        Args:
            metrics: Metrics of a candidate.

        Returns:
            The terms' values in order, higher is better.
        """
        return tuple(term.value(metrics) for term in self.terms)

    def _term(self, task: str) -> Term:
        for term in self.terms:
            if term.task == task:
                return term
        names = ", ".join(term.task for term in self.terms)
        raise ConfigError(f"'keep' names task '{task}', which is not in the objective; it has {names}")

    def _combined(self, values: Sequence[float]) -> float:
        if not all(math.isfinite(value) for value in values):
            return math.nan
        if self.kind == "worst":
            return min(values)
        total = math.fsum(term.weight for term in self.terms)
        pairs = list(zip(self.terms, values, strict=True))
        if self.kind == "geometric":
            if min(values) <= 0:
                return 0.0
            return math.exp(math.fsum(term.weight * math.log(value) for term, value in pairs) / total)
        return math.fsum(term.weight * value for term, value in pairs) / total


@dataclass(frozen=True, slots=True, order=True)
class Standing:
    """What ranks a candidate within its generation.

    Compared field by field, the first difference decides, more is better.

    Attributes:
        reached: The rung of a race that it reached, infinite for the end.
        kept: Minus its violation of the retention constraint.
        score: The objective that the search ranks by.
        tie: The tie-break score.
    """

    reached: float
    kept: float
    score: float
    tie: float


def ranks(standings: Sequence[Standing | None]) -> list[float | None]:
    """Ranks the candidates of a generation, as optimizers take them.

    Args:
        standings: Of each candidate; None for one that failed.

    Returns:
        0 for the best, -1 for the next, the same for equal ones; None for one that failed.
    """
    order = sorted({standing for standing in standings if standing is not None}, reverse=True)
    rank = {standing: -float(i) for i, standing in enumerate(order)}
    return [None if standing is None else rank[standing] for standing in standings]
