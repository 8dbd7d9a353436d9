"""The objective: what a search maximizes, from the tasks' metrics, and the order of candidates by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    pass
from evomerge.evaluation.records import Evaluation, ItemScore

Measure = Literal["metric", "probability", "logprob"]
"""What of a task the search may see: its metric, or a soft score of the right answer."""


@dataclass(frozen=True, slots=True)
class Term:
    """A task's share in the objective. sign: -1 for metrics where lower is better, such as perplexity.

    search: (measure, share) pairs that the search sees instead of the metric, shares above 0. subtasks: (task, share) pairs
    of a group whose items are those of other tasks, shares summing to one. mean: whether the task's metric is the mean
    of its items' values; only then has it an error, and only then can it be raced.
    """

    task: str
    weight: float = 1.0
    sign: int = 1
    search: tuple[tuple[Measure, float], ...] = (("metric", 1.0),)
    subtasks: tuple[tuple[str, float], ...] = ()
    mean: bool = True

    @property
    def strata(self) -> tuple[tuple[str, float], ...]:
        """(task, share) pairs of the tasks whose items are scored."""
        return self.subtasks or ((self.task, 1.0),)

    def value(self, metrics: Mapping[str, float], measure: Measure = "metric") -> float:
        """The task's value by a measure, higher is better. Raises ConfigError where the task has no such measure."""
        if measure == "metric" and self.task in metrics:
            return self.sign * metrics[self.task]
        names = [(task if measure == "metric" else f"{task}:{measure}", share) for task, share in self.strata]
        if any(name not in metrics for name, _ in names):
            raise ConfigError(missing_metric_message(self.task, measure))
        return (self.sign if measure == "metric" else 1) * math.fsum(
            share * metrics[name] for name, share in names
        )

    def search_value(self, metrics: Mapping[str, float]) -> float:
        """The task's value as the search sees it."""
        return math.fsum(share * self.value(metrics, m) for m, share in self.search) / math.fsum(
            share for _, share in self.search
        )

    def item_search_value(self, score: ItemScore) -> float | None:
        """One item's value as the search sees it; None for an item without the soft score that this needs."""
        values = {
            "metric": self.sign * score.value,
            "probability": score.probability,
            "logprob": score.logprob,
        }
        found = [(share, v) for m, share in self.search if (v := values[m]) is not None]
        whole = len(found) == len(self.search)
        return (
            math.fsum(share * v for share, v in found) / math.fsum(share for share, _ in found)
            if whole
            else None
        )


def missing_metric_message(task: str, measure: str) -> str:
    """The sentence for a task that has no such measure."""
    return f"task '{task}' gives no {measure} of a right answer, which the search was asked to use; let it search by the metric"


@dataclass(frozen=True, slots=True)
class Objective:
    """Metrics -> one number, higher is better: the weighted mean of the tasks, their weighted geometric mean, or the worst.

    The number that is reported is always made of the tasks' metrics; `search` is what the search ranks by, which may be
    made of soft scores. A geometric mean with a value at or below 0 is 0, the lowest it can be. keep: (task, x) pairs: a
    candidate must be at least as good there as the best parent less x. tie_break: the soft score that decides between
    equal ones; it changes ranks, never a score. layer_price: what each layer beyond `depth` costs; it ranks, and is not in
    what is reported.
    """

    terms: tuple[Term, ...]
    kind: Literal["mean", "geometric", "worst"] = "mean"
    keep: tuple[tuple[str, float], ...] = ()
    tie_break: Literal["probability", "logprob", "none"] = "none"
    layer_price: float = 0.0
    depth: int = 0

    def __post_init__(self) -> None:
        if not self.terms or any(t.weight <= 0 for t in self.terms):
            raise ConfigError("an objective needs at least one task, each with a weight above 0")
        for term in self.terms:
            if not term.search or any(share <= 0 for _, share in term.search):
                raise ConfigError(
                    f"task '{term.task}' needs shares above 0 of what the search sees, got {dict(term.search)}"
                )
            if self.kind == "geometric" and (term.sign < 0 or "logprob" in dict(term.search)):
                what = "a metric where lower is better" if term.sign < 0 else "a log-probability"
                raise ConfigError(
                    f"a geometric mean needs values above 0, and task '{term.task}' is scored by {what}; choose 'mean' or 'worst'"
                )
        for task, _ in self.keep:
            if not self._term(task).mean:
                raise ConfigError(
                    f"'keep' compares means of items, and the metric of task '{task}' is no mean; leave it out of 'keep'"
                )

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """The objective by the tasks' metrics; NaN if one is not finite."""
        return self._combined([t.value(metrics) for t in self.terms])

    def reported_score(self, evaluation: Evaluation) -> float | None:
        """The objective of an evaluation; None for one that failed, or whose objective is not finite."""
        score = math.nan if evaluation.error is not None else self(evaluation.metrics)
        return score if math.isfinite(score) else None

    def search_score(self, metrics: Mapping[str, float]) -> float:
        """The objective as the search sees it; NaN if a value is not finite. Raises ConfigError without the soft scores it needs."""
        return self._combined([t.search_value(metrics) for t in self.terms])

    def size_penalty(self, costs: Mapping[str, float]) -> float:
        """What a candidate's layers beyond `depth` cost."""
        return self.layer_price * max(0.0, costs.get("layers", self.depth) - self.depth)

    def tie_break_score(self, metrics: Mapping[str, float]) -> float:
        """What decides between equal scores: the weighted mean of the soft scores of the tasks that have one, 0 without any."""
        if self.tie_break == "none":
            return 0.0
        found = [t for t in self.terms if all(f"{leaf}:{self.tie_break}" in metrics for leaf, _ in t.strata)]
        weight = math.fsum(t.weight for t in found)
        return (
            math.fsum(t.weight * t.value(metrics, self.tie_break) for t in found) / weight if found else 0.0
        )

    def floors(self, parent: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Task of `keep` -> the value it must reach. parent: task -> metrics of its best parent on the candidate's items."""
        return {
            task: self._term(task).value(parent[task]) - slack for task, slack in self.keep if task in parent
        }

    def violation(self, metrics: Mapping[str, float], floors: Mapping[str, float]) -> float:
        """How far the tasks fall below their floors in sum; 0 for a candidate that keeps them."""
        return math.fsum(max(0.0, floor - self._term(task).value(metrics)) for task, floor in floors.items())

    def shares(self, metrics: Mapping[str, float] | None = None) -> dict[str, float]:
        """Task with items -> its signed share in the objective: the derivative of the objective by the task's metric.

        Constant for a mean, whose shares' absolute values sum to one; for the other kinds taken at `metrics` (delta
        method), where a geometric mean of 0 and the tasks that are not the worst have none.
        """
        total = math.fsum(t.weight for t in self.terms)
        slopes = [t.weight / total for t in self.terms]
        if self.kind != "mean":
            if metrics is None:
                raise ValueError(f"the shares of a '{self.kind}' objective depend on the metrics")
            values = [t.value(metrics) for t in self.terms]
            whole = self._combined(values)
            if self.kind == "geometric":
                slopes = [s * whole / v if v > 0 else 0.0 for s, v in zip(slopes, values, strict=True)]
            else:
                slopes = [float(i == values.index(whole)) for i in range(len(values))]
        out: dict[str, float] = {}
        for term, slope in zip(self.terms, slopes, strict=True):
            for task, share in term.strata:
                out[task] = out.get(task, 0.0) + slope * term.sign * share
        return out

    def search_items(self, items: Sequence[ItemScore]) -> tuple[ItemScore, ...]:
        """The items with their value as the search sees it, higher is better: to be averaged by `search_shares`.

        Left out is an item without the soft score that its task is searched by, such as one without a right answer.
        """
        terms = {task: t for t in self.terms for task, _ in t.strata}
        values = [(s, terms[s.task].item_search_value(s)) for s in items if s.task in terms]
        return tuple(replace(s, value=v) for s, v in values if v is not None)

    @property
    def search_shares(self) -> dict[str, float]:
        """Task with items -> its share in a mean objective as the search sees it; they sum to one."""
        return {task: abs(share) for task, share in Objective(self.terms).shares().items()}

    @property
    def is_mean_of_items(self) -> bool:
        """Whether the objective is a weighted mean of item values, so that it has paired errors and can be raced."""
        return self.kind == "mean" and all(t.mean for t in self.terms)

    def task_values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The tasks' values, higher is better: what a Pareto front compares."""
        return tuple(t.value(metrics) for t in self.terms)

    def _term(self, task: str) -> Term:
        for term in self.terms:
            if term.task == task:
                return term
        raise ConfigError(
            f"'keep' names task '{task}', which is not in the objective; it has {', '.join(t.task for t in self.terms)}"
        )

    def _combined(self, values: Sequence[float]) -> float:
        if not all(math.isfinite(v) for v in values):
            return math.nan
        if self.kind == "worst":
            return min(values)
        total = math.fsum(t.weight for t in self.terms)
        if self.kind == "geometric":
            if min(values) <= 0:
                return 0.0
            return math.exp(
                math.fsum(t.weight * math.log(v) for t, v in zip(self.terms, values, strict=True)) / total
            )
        return math.fsum(t.weight * v for t, v in zip(self.terms, values, strict=True)) / total


@dataclass(frozen=True, slots=True, order=True)
class Standing:
    """What ranks a candidate within its generation, the first difference decides, more is better.

    reached: the rung of a race it got to, infinite for the end; kept: minus its violation of `keep`; score: the objective
    as the search sees it; tie: the tie-breaker.
    """

    reached: float
    kept: float
    score: float
    tie: float


def ranks(standings: Sequence[Standing | None]) -> list[float | None]:
    """What an optimizer is told: 0 for the best, -1 for the next, equals alike; None for a candidate that failed."""
    order = sorted({s for s in standings if s is not None}, reverse=True)
    place = {s: -float(i) for i, s in enumerate(order)}
    return [None if s is None else place[s] for s in standings]
