"""What scoring a candidate gives, and how it becomes one number. Knows nothing of lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from evomerge.errors import ConfigError

Role = Literal["search", "validation", "test"]
ROLES: tuple[Role, ...] = ("search", "validation", "test")
Items = Mapping[str, Sequence[str]]
"""Task name -> ids of the items to score, in order."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item's value of its task's metric, and two soft scores beside it where the task has a right answer.

    probability: of the right answer, in [0, 1]: among the choices, or of the whole answer. logprob: mean log-probability
    of a token of the right answer, in nats, at most 0.
    """

    task: str
    item: str
    value: float
    probability: float | None = None
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A scored candidate, or the sentence that says why it could not be scored.

    metrics: task name -> the task's metric over the items; empty if `error` is set. seconds: stage name -> seconds.
    """

    recipe_id: str
    items: tuple[ItemScore, ...]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str | None = None


class Evaluator(Protocol):
    """Scores a live model on items. Raises any exception where that is impossible; the worker makes it a value."""

    def items(self, role: Role) -> Items:
        """All items of a role, in a fixed order; roles share none."""
        ...

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item values and the metric of each task."""
        ...


@dataclass(frozen=True, slots=True)
class Term:
    """A task's share in the objective. sign: -1 for metrics where lower is better, such as perplexity."""

    task: str
    weight: float = 1.0
    sign: int = 1


@dataclass(frozen=True, slots=True)
class Objective:
    """Metrics -> one number, higher is better: the weighted mean of the tasks, or the worst of them."""

    terms: tuple[Term, ...]
    kind: Literal["mean", "worst"] = "mean"

    def __post_init__(self) -> None:
        if not self.terms or any(t.weight <= 0 for t in self.terms):
            raise ConfigError("an objective needs at least one task, each with a weight above 0")

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """The objective; NaN if a metric is not finite."""
        values = [t.sign * metrics[t.task] for t in self.terms]
        if not all(math.isfinite(v) for v in values):
            return math.nan
        if self.kind == "worst":
            return min(values)
        return math.fsum(t.weight * v for t, v in zip(self.terms, values, strict=True)) / math.fsum(t.weight for t in self.terms)

    def paired_difference(self, a: Sequence[ItemScore], b: Sequence[ItemScore]) -> tuple[float, float]:
        """(mean difference a - b, its standard error) of the weighted mean over items that both have.

        Paired on items; tasks are strata: var = sum_t w_t² s_t² / n_t with the weights summing to one.
        """
        other = {(s.task, s.item): s.value for s in b}
        total, mean, variance = math.fsum(t.weight for t in self.terms), 0.0, 0.0
        for term in self.terms:
            d = [term.sign * (s.value - other[s.task, s.item]) for s in a if s.task == term.task and (s.task, s.item) in other]
            if len(d) < 2:
                return math.nan, math.nan
            m = math.fsum(d) / len(d)
            share = term.weight / total
            mean += share * m
            variance += share**2 * math.fsum((x - m) ** 2 for x in d) / (len(d) - 1) / len(d)
        return mean, math.sqrt(variance)
