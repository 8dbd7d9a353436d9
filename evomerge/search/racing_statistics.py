"""Which candidates will be the best on all items, predicted from their scores on a part of the items.

Given the first m of n items of each task, a candidate's mean over all n is predicted: the known part has no
error, the rest is drawn about an empirical-Bayes mean, shrunk to the mean of all candidates by how much of
their spread is noise of items (Efron and Morris 1973). Noise is joint: candidates that err on the same items
differ by less than their errors say. A candidate is settled, chosen or dropped, as soon as the probability
that any of the settled ones is wrong is small: with choosing beside dropping this is the race for the best mu
of Heidrich-Meisner and Igel 2009, "Hoeffding and Bernstein races for selecting policies in evolutionary
direct policy search", with a predictive distribution in place of their bounds. Knows nothing of recipes,
items' names or rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 4000  # of the predictive distribution: an error of .01 a step is 40 of them


@dataclass(frozen=True, slots=True)
class Settled:
    """What is known of candidates, by their rows.

    Attributes:
        chosen: Sure to be among the best.
        dropped: Sure not to be.
        open: Neither.
    """

    chosen: tuple[int, ...]
    dropped: tuple[int, ...]
    open: tuple[int, ...]


def settle(
    values: Sequence[Array],
    sizes: Sequence[int],
    weights: Sequence[float],
    mu: int,
    error: float,
    seed: Sequence[int] = (0,),
) -> Settled:
    """Finds candidates that are surely among the mu best by the weighted sum of task means, or surely not.

    Nothing is settled while no item tells the candidates' noise.

    Args:
        values: Of each task, [candidates, m] scores on its first m >= 2 items, finite.
        sizes: Of each task, its n >= m items.
        weights: Of each task; higher sums are better.
        mu: How many candidates are the best.
        error: Probability in (0, 1) that any of the settled is settled wrongly.
        seed: Non-negative numbers that key the draws.

    Returns:
        The rows of the chosen, the dropped and the open ones.
    """
    count = len(values[0])
    if not 0 < mu < count:
        every = tuple(range(count))
        return Settled(every, (), ()) if mu > 0 else Settled((), every, ())
    expected, covariance, freedom = predict(values, sizes, weights)
    if all(v.shape[1] >= n for v, n in zip(values, sizes, strict=True)):
        order = np.argsort(-expected, kind="stable")
        return Settled(tuple(sorted(order[:mu].tolist())), tuple(sorted(order[mu:].tolist())), ())
    # of values that are alike, rounding is left
    if np.trace(covariance) <= 1e-24 * np.square(expected).sum():
        return Settled((), (), tuple(range(count)))
    generator = np.random.default_rng([*seed])
    noise = generator.standard_normal((DRAWS, count)) @ _root(covariance).T
    drawn = expected + noise / np.sqrt(generator.chisquare(freedom, (DRAWS, 1)) / freedom)  # multivariate t
    ranks = np.argsort(np.argsort(-drawn, axis=1, kind="stable"), axis=1, kind="stable")
    inside = ranks < mu  # [draws, candidates]
    share = inside.mean(axis=0)
    choose = share > 0.5
    surest = np.argsort(np.minimum(share, 1.0 - share), kind="stable")
    # draws where any of the k surest is wrong
    errs = np.maximum.accumulate((inside != choose)[:, surest], axis=1).sum(axis=0)
    wrong = (errs + 1) / (DRAWS + 1)  # no event is taken to be rarer than the draws can tell
    sure = surest[: np.searchsorted(wrong, error, side="right")]
    chosen, dropped = sorted(sure[choose[sure]].tolist()), sorted(sure[~choose[sure]].tolist())
    return Settled(
        tuple(chosen), tuple(dropped), tuple(i for i in range(count) if i not in {*chosen, *dropped})
    )


def predict(
    values: Sequence[Array], sizes: Sequence[int], weights: Sequence[float]
) -> tuple[Array, Array, float]:
    """Predicts the weighted sums of task means over all items.

    By task, with m of n items known, f = m / n, B the share of the candidates' spread that is not noise, and
    C the covariance of an item's scores: mean f ȳ + (1 - f)(ȳ.. + B (ȳ - ȳ..)), covariance
    (1 - f)² (B / m + 1 / (n - m)) C. C is taken with one more item whose variance is the mean of the tasks':
    a task where all candidates agree so far is not one where they always do. Skills on different tasks are
    taken to be independent, and the candidates to be equally unlike: where they are not, errors are larger
    than stated, which the races in results/racing.md had room for.

    Args:
        values: As in `settle`.
        sizes: As in `settle`.
        weights: As in `settle`.

    Returns:
        Expected sums [candidates], their covariance [candidates, candidates] up to what all share, and its
        degrees of freedom.
    """
    count = len(values[0])
    typical = _typical(values, weights)
    expected, covariance, satterthwaite = np.zeros(count), np.zeros((count, count)), 0.0
    for own, n, w in zip(values, sizes, weights, strict=True):
        m = own.shape[1]
        mean = own.mean(axis=1)
        if m >= n:
            expected += w * mean
            continue
        centred = _interaction(own)
        c = (centred @ centred.T + typical * np.eye(count)) / m  # m - 1 degrees of freedom and one prior item
        noise, between = float(np.trace(c)) / (count - 1) / m, float(mean.var(ddof=1))
        b = max(0.0, 1.0 - noise / between) if between > 0 else 0.0
        f = m / n
        part = (w * (1.0 - f)) ** 2 * (b / m + 1.0 / (n - m)) * c
        expected += w * (f * mean + (1.0 - f) * (mean.mean() + b * (mean - mean.mean())))
        covariance += part
        satterthwaite += float(np.trace(part)) ** 2 / m
    total = float(np.trace(covariance))
    return expected, covariance, total**2 / satterthwaite if satterthwaite > 0 else 1.0


def deviations(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """Measures the noise that hides which candidates are better.

    Args:
        values: As in `settle`.
        weights: As in `settle`.

    Returns:
        [tasks] standard deviations of an item's scores about the candidates' and the items' means, with one
        more item of mean variance.
    """
    known = np.array([own.shape[1] - 1.0 for own in values])
    sums = np.array([_variance(own) for own in values]) * known
    found: Array = np.sqrt((sums + _typical(values, weights)) / (known + 1.0))
    return found


def allocate(
    noise: Array, weights: Sequence[float], taken: Sequence[int], sizes: Sequence[int], budget: int
) -> list[int]:
    """Divides a budget of items between tasks.

    The error of the weighted sum is least where a task's items are in proportion to its weight times its
    `deviations` (Neyman 1934).

    Args:
        noise: `deviations` of the tasks.
        weights: Of each task.
        taken: Items that each task has already.
        sizes: Items that each task has in all.
        budget: Items to have in all after the next step.

    Returns:
        Items of each task after the next step: at least those taken, in all about the budget, up to one more
        a task.
    """
    need = np.maximum(np.abs(weights) * noise, 1e-12)
    low, high = 0.0, float(max(sizes)) / float(need.min())
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * need, taken, sizes).sum() < budget:
            low = middle
        else:
            high = middle
    return [int(x) for x in np.ceil(np.clip(high * need, taken, sizes) - 1e-6)]


def aligned(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """Compares candidates that were scored on different numbers of items.

    Each was scored on the first items of a task. Its mean is corrected by how easy those were for the
    candidates that have the most.

    Args:
        values: Of each task, [candidates, n] scores, NaN where a candidate was not scored.
        weights: Of each task.

    Returns:
        [candidates] weighted sums of task means.
    """
    most = int(max(sum(np.isfinite(own[i]).sum() for own in values) for i in range(len(values[0]))))
    full = [i for i in range(len(values[0])) if sum(np.isfinite(own[i]).sum() for own in values) == most]
    out = np.zeros(len(values[0]))
    for own, w in zip(values, weights, strict=True):
        items = np.isfinite(own[full[0]])
        ease = own[np.ix_(full, items)].mean(axis=0)
        own = own[:, items]
        has = np.isfinite(own)
        out += w * (np.where(has, own - ease, 0.0).sum(axis=1) / has.sum(axis=1) + ease.mean())
    return out


def _variance(values: Array) -> float:
    """Half the variance of an item's difference between two candidates, averaged over pairs."""
    count, m = values.shape
    return float((_interaction(values) ** 2).sum() / max(1, (count - 1) * (m - 1)))


def _typical(values: Sequence[Array], weights: Sequence[float]) -> float:
    """The weighted mean of the tasks' variances."""
    share = np.abs(weights) / np.abs(weights).sum()
    return float(sum(float(s) * _variance(own) for s, own in zip(share, values, strict=True)))


def _interaction(values: Array) -> Array:
    """[candidates, m] scores less the candidates' and the items' means."""
    centred = values - values.mean(axis=1, keepdims=True)
    out: Array = centred - centred.mean(axis=0)
    return out


def _root(covariance: Array) -> Array:
    """The symmetric R with R R = covariance, which may be singular.

    Unlike the eigenvectors it is the same on every machine.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ vectors.T
    return root
