"""Intervals of scores and leads: against scipy's, by exact coverage, and never where no score can be."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from evomerge.evaluation import Evaluation, ItemScore, Objective, Term
from evomerge.evaluation.intervals import bounded_interval, lead_interval, score_interval
from evomerge.search import selection
from evomerge.store import Scored


def items(values: list[float], task: str = "a") -> list[ItemScore]:
    return [ItemScore(task, str(i), v) for i, v in enumerate(values)]


def right(k: int, n: int) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


@pytest.mark.parametrize("n", [1, 5, 20, 137])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_right_and_wrong_have_wilsons_interval(n: int, level: float) -> None:
    for k in {0, 1, n // 2, n}:
        oracle = stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert bounded_interval(right(k, n), level) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_twenty_right_of_twenty_are_no_certainty() -> None:
    objective = Objective((Term("a"),))
    evaluation = Evaluation("r", tuple(items(right(20, 20))), {"a": 1.0}, {})
    scored = Scored(1.0, evaluation, 1.0)
    low, high = selection.interval(selection.headline(objective, scored), objective, scored)["test_interval"]
    assert low == pytest.approx(0.8389, abs=1e-4)
    assert high == 1.0


@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_an_interval_covers_as_often_as_it_says(n: int, p: float) -> None:
    covered = 0.0
    for k in range(n + 1):
        low, high = bounded_interval(right(k, n))
        covered += float(stats.binom.pmf(k, n, p)) * (low <= p <= high)
    assert covered >= 0.89, "Wilson's interval is near its level on average and seldom far below"


@pytest.mark.parametrize("seed", range(30))
def test_a_mean_of_shares_stays_between_0_and_1_and_a_lead_between_their_differences(seed: int) -> None:
    rng = random.Random(seed)
    shares = {"a": 0.2, "b": 0.5, "c": 0.3}
    kind = seed % 3
    one, other = [], []
    for task in shares:
        n, p = rng.randint(1, 40), rng.choice([0.0, 0.05, 0.5, 0.97, 1.0])
        for found, q in ((one, p), (other, rng.choice([p, 1 - p]))):
            values = [
                float(rng.random() < q) if kind else rng.betavariate(0.3 + q, 1.3 - q) for _ in range(n)
            ]
            found += items(values, task)

    def score(found: list[ItemScore]) -> float:
        return sum(w * np.mean([s.value for s in found if s.task == t]) for t, w in shares.items())

    low, high = score_interval(one, shares, score(one))
    assert 0.0 <= low <= score(one) <= high <= 1.0
    assert high > low
    lead = score(one) - score(other)
    below, above = lead_interval(one, other, shares, lead)
    assert -1.0 - 1e-12 <= below <= lead <= above <= 1.0 + 1e-12
    assert above > below


def test_many_items_have_the_plain_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(4000), rng.random(4000)
    for values in (a, (a < 0.3).astype(float)):
        plain = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        assert bounded_interval(values.tolist()) == pytest.approx(plain, abs=3e-4)
    one, other = (a < 0.5).astype(float), ((a + 0.2 * b) < 0.5).astype(float)
    d = one - other
    plain = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
    found = lead_interval(items(one.tolist()), items(other.tolist()), {"a": 1.0}, float(d.mean()))
    assert found == pytest.approx(plain, abs=1e-3)


def test_a_lead_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    for won, lost, n in ((0.1, 0.1, 30), (0.05, 0.2, 60), (0.4, 0.4, 40), (0.0, 0.03, 50)):
        hits = 0
        for _ in range(600):
            d = rng.choice([1.0, -1.0, 0.0], size=n, p=[won, lost, 1 - won - lost])
            one, other = np.where(d > 0, 1.0, 0.0), np.where(d < 0, 1.0, 0.0)
            low, high = lead_interval(items(one.tolist()), items(other.tolist()), {"a": 1.0}, float(d.mean()))
            hits += low <= won - lost <= high
        assert hits / 600 >= 0.92


def test_values_beyond_1_have_students_interval() -> None:
    values = [3.0, 7.5, 12.0, 4.0, 9.0]
    plain = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = score_interval(items(values), {"a": -1.0}, -float(np.mean(values)))
    assert found == pytest.approx((-plain[1], -plain[0]))
    assert score_interval(items([3.0]), {"a": 1.0}, 3.0) == (-math.inf, math.inf)
