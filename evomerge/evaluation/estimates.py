"""Estimates with errors from per-item scores.

Weighted means over tasks, paired differences, control variates.

Items of a task are a random sample of that task, and tasks are strata: var = sum_t w_t² s_t² / n_t, with the
degrees of freedom of Welch and Satterthwaite. Where all values of a task agree, s_t is 0 although the task's
error is not: with few items and scores near 0 or 1 the errors are too small. Knows nothing of models, studies
or stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.evaluation.objective import Objective
from evomerge.evaluation.records import Evaluation, Items, ItemScore


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        mean: The mean; NaN where there are no items.
        error: Its standard error; infinite where too few items leave it unknown (fewer than two in a task).
        n: Number of items that it rests on.
        freedom: Degrees of freedom; None for n - 1.
    """

    mean: float
    error: float
    n: int
    freedom: float | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Computes a confidence interval by Student's t.

        Args:
            level: Probability, in (0, 1), with which the interval covers the true mean.

        Returns:
            (low, high); infinite where the error is unknown.

        Raises:
            ValueError: `level` is not in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level}")
        if not math.isfinite(self.error):
            return -math.inf, math.inf
        half = t_quantile(0.5 + level / 2, self._freedom) * self.error
        return self.mean - half, self.mean + half

    def p_value(self, null: float = 0.0) -> float:
        """Computes the two-sided p-value of a hypothesis.

        Args:
            null: The true mean under the hypothesis.

        Returns:
            A number in [0, 1]; 1 where the error is unknown.
        """
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0.0:
            return float(self.mean == null)
        return min(1.0, 2.0 * t_cdf(-abs(self.mean - null) / self.error, self._freedom))

    @property
    def _freedom(self) -> float:
        return max(1.0, self.n - 1.0 if self.freedom is None else self.freedom)


def t_cdf(t: float, freedom: float) -> float:
    """Computes the distribution function of Student's t.

    Args:
        t: Where to evaluate it.
        freedom: Degrees of freedom, above 0, not necessarily whole.

    Returns:
        P(T <= t).
    """
    from scipy.special import stdtr  # its import takes longer than all that reads a study

    return float(stdtr(freedom, t))


def t_quantile(p: float, freedom: float) -> float:
    """Computes a quantile of Student's t.

    Args:
        p: Probability, in (0, 1).
        freedom: Degrees of freedom, above 0, not necessarily whole.

    Returns:
        The t with P(T <= t) = p.
    """
    from scipy.special import stdtrit

    return float(stdtrit(freedom, p))


def stratified(items: Sequence[ItemScore], weights: Mapping[str, float]) -> Estimate:
    """Estimates the weighted mean over tasks of the mean over a task's items.

    Args:
        items: Scores of items; those of other tasks are left out.
        weights: Task -> weight, below 0 where lower is better. The sum of their sizes is scaled to 1, so that
            only their ratios count; at least one must not be 0.

    Returns:
        The estimate, with tasks as strata.
    """
    by_task: dict[str, list[float]] = {task: [] for task in weights}
    for score in items:
        if score.task in by_task:
            by_task[score.task].append(score.value)
    return _combine([(w, _moments(by_task[task])) for task, w in weights.items()])


def objective_estimate(
    objective: Objective, evaluation: Evaluation, reported: float | None
) -> Estimate | None:
    """Estimates an objective with its error.

    By the delta method where it is a geometric mean or the worst task; the worst task's error leaves out that
    another could be the worst.

    Args:
        objective: What a search maximizes.
        evaluation: Of a candidate.
        reported: The objective by the tasks' metrics of the evaluation, None where it failed.

    Returns:
        The objective with its error; None for metrics that are no means of items, or an unknown error.
    """
    if reported is None or not all(term.mean for term in objective.terms):
        return None
    shares = objective.shares(evaluation.metrics)
    size = math.fsum(abs(share) for share in shares.values())
    if size == 0:
        return None
    estimate = stratified(evaluation.items, shares)
    if not math.isfinite(estimate.error):
        return None
    return replace(estimate, mean=reported, error=estimate.error * size)


def paired(a: Sequence[ItemScore], b: Sequence[ItemScore], weights: Mapping[str, float]) -> Estimate:
    """Estimates the weighted mean over tasks of a - b, item by item.

    Args:
        a: Scores of one candidate.
        b: Scores of another; items that only one of the two has are left out.
        weights: As in `stratified`.

    Returns:
        The estimate of the difference.
    """
    other = {(score.task, score.item): score.value for score in b}
    differences = [
        ItemScore(score.task, score.item, score.value - other[score.task, score.item])
        for score in a
        if (score.task, score.item) in other
    ]
    return stratified(differences, weights)


def selection_bias(search: Estimate, test: Estimate) -> Estimate:
    """Estimates the selection bias: what a search score owes to the candidate having been selected by it.

    Args:
        search: Estimate on items of the search.
        test: Estimate of the same candidate on other items.

    Returns:
        search - test.
    """
    return _sum([(1.0, search), (-1.0, test)])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for multiple tests.

    Args:
        p_values: Each in [0, 1].

    Returns:
        Adjusted p-values in the same order: comparing each with α keeps the probability of any false
        rejection at most α.

    Raises:
        ValueError: A p-value is not in [0, 1].

    References:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    if any(not 0.0 <= p <= 1.0 for p in p_values):
        raise ValueError(f"p-values must be in [0, 1], got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class ItemMeans:
    """How easy every item is, from all candidates that were scored on it.

    An item's easiness is the mean of its value less each candidate's own mean over the task.
    `control_variate` needs it rather than the plain mean value: candidates of later generations are better
    and see other items, and means of plain values would take their skill for the easiness of their items.

        means = ItemMeans()
        for evaluation in evaluations:
            means.add(evaluation.items)
        control_variate(candidate.items, means, pool, weights)
    """

    def __init__(self) -> None:
        self._count: dict[tuple[str, str], int] = {}
        self._value: dict[tuple[str, str], float] = {}
        self._easiness: dict[tuple[str, str], float] = {}

    def add(self, items: Sequence[ItemScore]) -> None:
        """Adds a candidate's scores.

        Args:
            items: Scores of all items that one candidate was scored on.
        """
        by_task: dict[str, list[float]] = {}
        for score in items:
            by_task.setdefault(score.task, []).append(score.value)
        task_means = {task: math.fsum(values) / len(values) for task, values in by_task.items()}
        for score in items:
            key = (score.task, score.item)
            self._count[key] = self._count.get(key, 0) + 1
            self._value[key] = self._value.get(key, 0.0) + score.value
            self._easiness[key] = self._easiness.get(key, 0.0) + score.value - task_means[score.task]

    @property
    def means(self) -> dict[tuple[str, str], float]:
        """(task, item) -> mean value, of every item that was scored."""
        return {key: total / self._count[key] for key, total in self._value.items()}

    @property
    def easiness(self) -> dict[tuple[str, str], float]:
        """(task, item) -> mean of the value less the candidate's own mean, of every scored item.

        About 0 on average.
        """
        return {key: total / self._count[key] for key, total in self._easiness.items()}


def control_variate(
    items: Sequence[ItemScore], means: ItemMeans, pool: Items, weights: Mapping[str, float]
) -> Estimate:
    """Estimates what a candidate would score on a whole pool of items.

    Its mean, corrected by how easy its items are.

    By task: mean_pool(easiness) + mean_S(y - easiness), S the items that it was scored on, 0 the easiness of
    an item that no candidate met. The error is that of a sample of |S| from the |pool| items without
    replacement, 0 where it was scored on all. Candidates scored on different items become comparable whatever
    the easiness is good for: it is averaged, not fitted.

    Args:
        items: The candidate's scores.
        means: Easiness of items, from all candidates.
        pool: Task -> ids of all items of the pool; at least one each.
        weights: As in `stratified`.

    Returns:
        The estimate.
    """
    easiness = means.easiness
    parts = []
    for task, weight in weights.items():
        ids = set(pool[task])
        residuals = [
            score.value - easiness.get((task, score.item), 0.0)
            for score in items
            if score.task == task and score.item in ids
        ]
        residual = _moments(residuals)
        shift = math.fsum(easiness.get((task, item), 0.0) for item in pool[task]) / len(pool[task])
        unseen = 1.0 - len(residuals) / len(ids)  # correction for a finite population
        error = residual.error * math.sqrt(unseen) if unseen > 0 else 0.0
        parts.append((weight, Estimate(residual.mean + shift, error, residual.n)))
    return _combine(parts)


def _moments(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n)."""
    n = len(values)
    if n < 2:
        return Estimate(values[0] if values else math.nan, math.inf, n)
    mean = math.fsum(values) / n
    return Estimate(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n), n)


def _combine(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Weighted mean of independent estimates, the sizes of the weights scaled to a sum of 1."""
    total = math.fsum(abs(w) for w, _ in parts)
    if total == 0.0:
        raise ValueError("a weighted mean needs at least one task whose weight is not 0")
    return _sum([(w / total, e) for w, e in parts if w != 0.0])


def _sum(parts: Iterable[tuple[float, Estimate]]) -> Estimate:
    """Weighted sum of independent estimates.

    Degrees of freedom by Satterthwaite 1946: ν = (Σ v)² / Σ (v² / ν_i) with v = w² error².
    """
    parts = list(parts)
    mean, n = math.fsum(w * e.mean for w, e in parts), sum(e.n for _, e in parts)
    variances = [(w * e.error) ** 2 for w, e in parts]
    variance = math.fsum(variances)
    if not math.isfinite(variance):
        return Estimate(mean, math.inf, n)
    spread = math.fsum(v**2 / e._freedom for v, (_, e) in zip(variances, parts, strict=True))
    return Estimate(mean, math.sqrt(variance), n, variance**2 / spread if spread > 0 else None)
