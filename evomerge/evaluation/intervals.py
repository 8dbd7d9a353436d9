"""Confidence intervals of scores and leads that stay where scores can be.

Of a task whose items are right or wrong: Wilson's score interval. Of other values in [0, 1]: the same formula
with the effective number of items n m (1 - m) / s², which is n for right and wrong, and Student's quantile. A
lead is the share of what was won less the share of what was lost, each by that formula. Of any other values:
Student's t. Tasks are put together from their intervals (MOVER), which keeps a mean of shares in [0, 1].

References:
    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data".
    Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evomerge.evaluation.estimates import t_quantile
from evomerge.evaluation.records import ItemScore

Interval = tuple[float, float]
_Part = tuple[float, Interval]  # (mean, its interval)


def bounded_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Computes the interval of the mean of values in [0, 1].

    Args:
        values: Of items that are a random sample, at least one.
        level: Probability, in (0, 1), with which the interval is to cover the true mean.

    Returns:
        (low, high), in [0, 1]; for values that are 0 or 1 Wilson's score interval.
    """
    from scipy.special import ndtri  # its import takes longer than all that reads a study

    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / n
    binary = all(v in (0, 1) for v in values)
    effective = float(n) if binary or variance == 0 else max(n * mean * (1 - mean) / variance, float(n))
    quantile = float(ndtri(0.5 + level / 2)) if binary or n < 2 else t_quantile(0.5 + level / 2, n - 1)
    q = quantile**2 / effective
    centre = (mean + q / 2) / (1 + q)
    half = math.sqrt(q * mean * (1 - mean) + q * q / 4) / (1 + q)
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def score_interval(
    items: Sequence[ItemScore], shares: Mapping[str, float], score: float, level: float = 0.95
) -> Interval:
    """Computes the interval of a score that is made of means of tasks.

    Args:
        items: The candidate's item scores; those of other tasks are left out.
        shares: Task -> derivative of the score by the task's mean.
        score: The score.
        level: As in `bounded_interval`.

    Returns:
        (low, high), in [0, 1] where all items are and no share is below 0; infinite where a task has one item
        that is not in [0, 1].
    """
    by_task: dict[str, list[float]] = {task: [] for task, share in shares.items() if share}
    for item in items:
        if item.task in by_task:
            by_task[item.task].append(item.value)
    parts = {task: _mean(values, level) for task, values in by_task.items() if values}
    low, high = _combined(parts, shares, score)
    bounded = all(0 <= v <= 1 for values in by_task.values() for v in values)
    if bounded and all(share >= 0 for share in shares.values()):
        return max(0.0, low), min(1.0, high)
    return low, high


def lead_interval(
    one: Sequence[ItemScore],
    other: Sequence[ItemScore],
    shares: Mapping[str, float],
    lead: float,
    level: float = 0.95,
) -> Interval:
    """Computes the interval of a lead, paired item by item.

    Args:
        one: Item scores of a candidate.
        other: Those of another; items that only one of the two has are left out.
        shares: Task -> its signed share.
        lead: The weighted mean of the differences.
        level: As in `bounded_interval`.

    Returns:
        (low, high), in [-1, 1] where all items are in [0, 1].
    """
    values = {(s.task, s.item): s.value for s in other}
    by_task: dict[str, list[tuple[float, float]]] = {task: [] for task, share in shares.items() if share}
    for s in one:
        if s.task in by_task and (s.task, s.item) in values:
            by_task[s.task].append((s.value, values[s.task, s.item]))
    parts = {task: _lead(pairs, level) for task, pairs in by_task.items() if pairs}
    return _combined(parts, shares, lead)


def _mean(values: Sequence[float], level: float) -> _Part:
    mean = math.fsum(values) / len(values)
    if all(0 <= v <= 1 for v in values):
        return mean, bounded_interval(values, level)
    return mean, _student(values, level)


def _lead(pairs: Sequence[tuple[float, float]], level: float) -> _Part:
    differences = [a - b for a, b in pairs]
    mean = math.fsum(differences) / len(differences)
    if not all(0 <= value <= 1 for pair in pairs for value in pair):
        return mean, _student(differences, level)
    won, lost = ([max(0.0, sign * d) for d in differences] for sign in (1, -1))
    (low_won, high_won), (low_lost, high_lost) = (bounded_interval(v, level) for v in (won, lost))
    m_won, m_lost = (math.fsum(v) / len(v) for v in (won, lost))
    r = _correlation(won, lost)
    low = mean - _joined(m_won - low_won, high_lost - m_lost, r)
    high = mean + _joined(high_won - m_won, m_lost - low_lost, r)
    return mean, (low, high)


def _joined(a: float, b: float, r: float) -> float:
    """Distance of a bound of a difference, from those of its parts, of which r is the correlation."""
    return math.sqrt(max(0.0, a * a + b * b - 2 * r * a * b))


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    n, m_one, m_other = len(one), math.fsum(one) / len(one), math.fsum(other) / len(other)
    variances = [math.fsum((v - m) ** 2 for v in of) for of, m in ((one, m_one), (other, m_other))]
    if not n or min(variances) <= 0:
        return 0.0
    both = math.fsum((a - m_one) * (b - m_other) for a, b in zip(one, other, strict=True))
    return max(-1.0, min(1.0, both / math.sqrt(variances[0] * variances[1])))


def _student(values: Sequence[float], level: float) -> Interval:
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return -math.inf, math.inf
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile(0.5 + level / 2, n - 1) * error
    return mean - half, mean + half


def _combined(parts: Mapping[str, _Part], shares: Mapping[str, float], centre: float) -> Interval:
    """The interval of a weighted sum of independent means, from their intervals."""
    below, above = [], []
    for task, (mean, (low, high)) in parts.items():
        share = shares[task]
        sides = [share * (mean - low), share * (high - mean)]
        down, up = sides if share > 0 else [-side for side in reversed(sides)]
        below.append(down**2)
        above.append(up**2)
    return centre - math.sqrt(math.fsum(below)), centre + math.sqrt(math.fsum(above))
