"""Estimates with errors from per-item scores: weighted means over tasks, paired differences, control variates.

Items of a task are a random sample of that task, and tasks are strata: var = sum_t w_t² s_t² / n_t, with the degrees of
freedom of Welch and Satterthwaite. Where all values of a task agree, s_t is 0 although the task's error is not: with few
items and scores near 0 or 1 the errors are too small. Knows nothing of models, studies or stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from evomerge.evaluation.records import Items, ItemScore


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error. n: items it rests on; freedom: degrees of freedom, None for n - 1.

    error is infinite where too few items leave it unknown (fewer than two in a task); mean is NaN where there are none.
    """

    mean: float
    error: float
    n: int
    freedom: float | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """(low, high) that covers the truth with probability `level` in (0, 1), by Student's t."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level}")
        if not math.isfinite(self.error):
            return -math.inf, math.inf
        half = t_quantile(0.5 + level / 2, self._freedom) * self.error
        return self.mean - half, self.mean + half

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p-value in [0, 1] of the hypothesis that the truth is `null`."""
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0.0:
            return float(self.mean == null)
        return min(1.0, 2.0 * t_cdf(-abs(self.mean - null) / self.error, self._freedom))

    @property
    def _freedom(self) -> float:
        return max(1.0, self.n - 1.0 if self.freedom is None else self.freedom)


def t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t; freedom: degrees of freedom > 0, not necessarily whole."""
    return float(stdtr(freedom, t))


def t_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p, p in (0, 1)."""
    return float(stdtrit(freedom, p))


def stratified(items: Sequence[ItemScore], weights: Mapping[str, float]) -> Estimate:
    """Weighted mean over tasks of the mean over a task's items.

    weights: task -> weight, below 0 where lower is better; the sum of their sizes is scaled to 1, so only their ratios
    count. Items of other tasks are left out.
    """
    by_task: dict[str, list[float]] = {task: [] for task in weights}
    for score in items:
        if score.task in by_task:
            by_task[score.task].append(score.value)
    return _combine([(w, _moments(by_task[task])) for task, w in weights.items()])


def paired(a: Sequence[ItemScore], b: Sequence[ItemScore], weights: Mapping[str, float]) -> Estimate:
    """Weighted mean over tasks of a - b, item by item, over the items that both have. weights: as in `stratified`."""
    other = {(s.task, s.item): s.value for s in b}
    common = [
        ItemScore(s.task, s.item, s.value - other[s.task, s.item]) for s in a if (s.task, s.item) in other
    ]
    return stratified(common, weights)


def selection_bias(search: Estimate, test: Estimate) -> Estimate:
    """search - test, of estimates on different items: what the search score owes to having been selected."""
    return _sum([(1.0, search), (-1.0, test)])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: comparing each with α keeps the chance of any false rejection at most α.

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

    means: (task, item) -> mean value. ease: (task, item) -> mean of the value less that candidate's own mean over the
    task. The second is what `control_variate` needs: candidates of later generations are better and see other items, and
    a mean of plain values would take their skill for the ease of their items.
    """

    def __init__(self) -> None:
        self._count: dict[tuple[str, str], int] = {}
        self._value: dict[tuple[str, str], float] = {}
        self._ease: dict[tuple[str, str], float] = {}

    def add(self, items: Sequence[ItemScore]) -> None:
        """Takes in the items that one candidate was scored on."""
        sums: dict[str, list[float]] = {}
        for s in items:
            sums.setdefault(s.task, []).append(s.value)
        own = {task: math.fsum(values) / len(values) for task, values in sums.items()}
        for s in items:
            key = (s.task, s.item)
            self._count[key] = self._count.get(key, 0) + 1
            self._value[key] = self._value.get(key, 0.0) + s.value
            self._ease[key] = self._ease.get(key, 0.0) + s.value - own[s.task]

    @property
    def means(self) -> dict[tuple[str, str], float]:
        """Mean value of every item that was scored."""
        return {key: total / self._count[key] for key, total in self._value.items()}

    @property
    def easiness(self) -> dict[tuple[str, str], float]:
        """Mean of the value less the candidate's own mean, of every item that was scored; about 0 on average."""
        return {key: total / self._count[key] for key, total in self._ease.items()}


def control_variate(
    items: Sequence[ItemScore], means: ItemMeans, pool: Items, weights: Mapping[str, float]
) -> Estimate:
    """What a candidate would score on the whole pool: its mean, corrected by how easy its items are in the pool.

    By task: mean_pool(ease) + mean_S(y - ease), S the items it was scored on, 0 the ease of an item that no candidate met;
    the error is that of a sample of |S| from the |pool| items without replacement, 0 where it was scored on all. Candidates
    scored on different items become comparable, whatever the ease is good for: it is averaged, not fitted.
    """
    easiness = means.easiness
    parts = []
    for task, w in weights.items():
        ids = set(pool[task])
        rest = [
            s.value - easiness.get((task, s.item), 0.0) for s in items if s.task == task and s.item in ids
        ]
        found = _moments(rest)
        shift = math.fsum(easiness.get((task, item), 0.0) for item in pool[task]) / len(pool[task])
        left = 1.0 - len(rest) / len(ids)  # finite population
        error = found.error * math.sqrt(left) if left > 0 else 0.0
        parts.append((w, Estimate(found.mean + shift, error, found.n)))
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
    """Weighted sum of independent estimates; Satterthwaite 1946: ν = (Σ v)² / Σ v² / ν_i with v = w² error²."""
    parts = list(parts)
    mean, n = math.fsum(w * e.mean for w, e in parts), sum(e.n for _, e in parts)
    variances = [(w * e.error) ** 2 for w, e in parts]
    variance = math.fsum(variances)
    if not math.isfinite(variance):
        return Estimate(mean, math.inf, n)
    spread = math.fsum(v**2 / e._freedom for v, (_, e) in zip(variances, parts, strict=True))
    return Estimate(mean, math.sqrt(variance), n, variance**2 / spread if spread > 0 else None)
