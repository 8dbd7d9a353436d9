"""Records of scoring a candidate: per-item scores, evaluations, and attempts at workers.

Plain frozen values that are stored, sent between processes and compared. This file knows nothing of lm-eval
or torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from evomerge.recipes import Recipe

Role = Literal["search", "validation", "test"]
"""What an item is used for. No item has two roles."""
ROLES: tuple[Role, ...] = ("search", "validation", "test")
TENTHS: tuple[tuple[Role, int], ...] = (("search", 6), ("validation", 8), ("test", 10))
"""(role, first tenth that is no longer its own), for items that are assigned by hash."""
Items = Mapping[str, Sequence[str]]
"""Task name -> ids of the items to score, in order."""
SoftMetric = Literal["probability", "logprob"]
SOFT_METRICS: tuple[SoftMetric, ...] = ("probability", "logprob")
"""Metrics of how likely the right answer is, beside a task's own metric; see `ItemScore`."""


def role_of_hash(digest: str) -> Role:
    """Assigns a role to an item that none was declared for.

    Args:
        digest: Hash of the item in hexadecimal, at least 8 digits; only the first 8 count.

    Returns:
        'search' for 6 tenths of all hashes, 'validation' and 'test' for 2 tenths each.
    """
    tenth = int(digest[:8], 16) % 10
    return next(role for role, end in TENTHS if tenth < end)


def soft_metric_name(task: str, soft_metric: str) -> str:
    """Returns the key under which a task's soft metric is found in metrics.

    Args:
        task: Name of a task or group.
        soft_metric: One of `SOFT_METRICS`.

    Returns:
        'TASK:probability' or 'TASK:logprob'.
    """
    return f"{task}:{soft_metric}"


def task_of_metric(name: str) -> str:
    """Returns the task that a key of metrics belongs to.

    Args:
        name: Key of `Evaluation.metrics`: a task's name, or one made by `soft_metric_name`.

    Returns:
        The task's name without the soft metric's suffix.
    """
    for soft_metric in SOFT_METRICS:
        suffix = soft_metric_name("", soft_metric)
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item's value of its task's metric, and two soft metrics where the task has a right answer.

    Attributes:
        task: Name of the task.
        item: Id of the item, unique within its task.
        value: The task's metric of this item.
        probability: Of the right answer, in [0, 1]: among the choices of a multiple choice, else of the whole
            answer.
        logprob: Mean log-probability of a token of the right answer, in nats, at most 0.
    """

    task: str
    item: str
    value: float
    probability: float | None = None
    logprob: float | None = None


Answer = str | int
"""What a model answered to an item: a text, or the number of a choice from 0."""
Labels = Mapping[str, Mapping[str, Sequence[Answer]]]
"""Task -> item -> answers that stand for the right ones."""
GOLD, SAMPLES, LEFT_OUT = "gold", "samples", "none"
"""Where the labels of a task come from, if not from one model: the task's own right answers; the answers of
all models that its metric finds right; none, the task is left out."""
FORWARDS_OF_A_SLOPE = 3
"""What a scored item with its derivatives costs, in forward passes: the backward pass counts as two."""
Coefficient = tuple[str, str, str]
"""(output tensor, parameter of a merge method, source model or '' for a parameter of the whole merge)."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model whose next-token distributions are to be kept on texts.

    Attributes:
        recipe: What makes the model.
        texts: Item id -> text.
    """

    recipe: Recipe
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GradientRequest:
    """Asks for the derivatives of a loss by a recipe's coefficients.

    The loss is the weighted sum of the items' losses, see `evomerge.evaluation.surrogates`; with a teacher it
    is that of the texts' divergences, KL(teacher || model) in nats, each the mean over a text's positions.

    Attributes:
        weights: Task -> the weight of each of its items.
        surrogate: What an item's loss is made of, one of `SURROGATES`.
        labels: Answers that stand for the items' own right ones; items without any keep theirs.
        derivatives: Whether they are wanted; else the loss alone, without a backward pass.
        teacher: If given, the items are texts of the teacher's and no items of tasks.
    """

    weights: Mapping[str, float]
    surrogate: Literal["logprob", "probability", "margin"] = "logprob"
    labels: Labels = field(default_factory=dict)
    derivatives: bool = True
    teacher: Teacher | None = None


@dataclass(frozen=True, slots=True)
class Slopes:
    """Derivatives of a loss by the coefficients of a merge.

    Attributes:
        loss: Its value.
        partials: Coefficient -> derivative.
        rows: Coefficient with a value for each row -> derivative by that of each row, in float32's numbers.
    """

    loss: float
    partials: Mapping[Coefficient, float]
    rows: Mapping[Coefficient, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A scored candidate, or the reason why it could not be scored.

    Attributes:
        recipe_id: Id of the candidate's recipe.
        items: Scores of every item.
        metrics: Task -> the task's metric over the items, and `soft_metric_name` -> mean of a soft metric
            where the task has a right answer. Empty if `error` is set, but for a candidate that the
            perplexity screen rejected: it has one metric, its nats per token.
        seconds: Name of a step (merging, scoring, ...) -> seconds.
        error: Why the candidate could not be scored; None if it was.
        costs: 'layers' and 'parameters' of the model, where it was built.
        slopes: What a `GradientRequest` asked for; then an item's value is its probability, and `metrics` has
            soft metrics alone.
        answers: Of each item the model's answer, where a job asked for them; None where it gave none that
            could be a label.
    """

    recipe_id: str
    items: tuple[ItemScore, ...]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    slopes: Slopes | None = None
    answers: tuple[Answer | None, ...] = ()


def mean_metrics(task: str, scores: Sequence[ItemScore]) -> dict[str, float]:
    """Computes a task's metric, where that is the mean of its items, and the means of its soft metrics.

    Args:
        task: Name of the task.
        scores: Scores of its items, at least one.

    Returns:
        Metrics by name: the task's own, then its soft metrics. A soft metric that no item has is left out;
        one that only some items have is their mean.
    """
    metrics = {task: math.fsum(score.value for score in scores) / len(scores)}
    values = {
        "probability": [score.probability for score in scores],
        "logprob": [score.logprob for score in scores],
    }
    for soft_metric in SOFT_METRICS:
        present = [value for value in values[soft_metric] if value is not None]
        if present:
            metrics[soft_metric_name(task, soft_metric)] = math.fsum(present) / len(present)
    return metrics


def soft_means(scores: Sequence[ItemScore]) -> dict[str, float]:
    """Computes the means of the soft metrics of items whose tasks' own metrics are not known.

    Args:
        scores: Scores of the items of one or several tasks.

    Returns:
        Metrics by name, soft ones alone.
    """
    by_task: dict[str, list[ItemScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    metrics: dict[str, float] = {}
    for task, own in by_task.items():
        metrics |= {name: value for name, value in mean_metrics(task, own).items() if name != task}
    return metrics


CAUSES = ("done", "failed", "died", "hung", "frozen", "memory", "lost", "late")
"""How an attempt can end; see `Attempt.cause`."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job by a worker, as it is stored.

    Attributes:
        recipe_id: Id of the recipe that was to be scored.
        number: Number of the attempt at this job, from 1.
        cause: One of `CAUSES`: 'done'; 'failed' (an `Evaluation` with an error); 'died' (the worker); 'hung'
            (killed at its time limit); 'frozen' (somebody stopped its process); 'memory' (the worker exceeded
            its memory limit); 'lost' (its node); 'late' (a result for which nobody waited any more).
        error: What went wrong; None if nothing did.
        worker: Name of the worker.
        host: Name of its machine.
        pid: Its process id.
        device: Its device.
        started: Unix time in seconds.
        seconds: How long the attempt took.
        log: The last lines of the worker's log, with secrets removed.
    """

    recipe_id: str
    number: int
    cause: str
    error: str | None
    worker: str
    host: str
    pid: int
    device: str
    started: float
    seconds: float
    log: str = ""
