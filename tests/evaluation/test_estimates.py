"""Estimates against plain loops, closed forms and simulations."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from evomerge.evaluation import ItemScore
from evomerge.evaluation.estimates import (
    Estimate,
    ItemMeans,
    control_variate,
    holm,
    paired,
    selection_bias,
    stratified,
    t_cdf,
    t_quantile,
)


def scores(task: str, values: list[float] | np.ndarray, start: int = 0) -> list[ItemScore]:
    return [ItemScore(task, str(start + i), float(v)) for i, v in enumerate(values)]


# ---- Student's t -------------------------------------------------------------------------------------------


def test_t_equals_the_printed_tables() -> None:
    # Abramowitz and Stegun, table 26.10, two-sided 5 % and 1 %
    table = {
        (1, 0.975): 12.706,
        (2, 0.975): 4.303,
        (5, 0.975): 2.571,
        (10, 0.995): 3.169,
        (30, 0.975): 2.042,
        (120, 0.995): 2.617,
    }
    for (freedom, p), t in table.items():
        assert t_quantile(p, freedom) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("freedom", [1.0, 2.5, 7.0, 61.3, 4e3])
def test_t_integrates_its_density(freedom: float) -> None:
    t = np.linspace(0.0, 3.0, 200_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi
    )
    area = np.trapezoid(constant * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t)
    assert t_cdf(3.0, freedom) == pytest.approx(0.5 + area, abs=1e-9)
    assert t_quantile(t_cdf(3.0, freedom), freedom) == pytest.approx(3.0, abs=1e-9)


def test_an_interval_and_a_p_value_say_the_same() -> None:
    for mean, error, n, level in itertools.product((-0.3, 0.0, 0.2), (0.05, 0.4), (3, 50), (0.5, 0.95)):
        estimate = Estimate(mean, error, n)
        for end in estimate.interval(level):
            assert estimate.p_value(end) == pytest.approx(1 - level, abs=1e-9)
        assert estimate.p_value(mean) == pytest.approx(1.0)


def test_too_few_items_give_no_verdict() -> None:
    for items in ([], scores("a", [1.0])):
        estimate = stratified(items, {"a": 1.0})
        assert estimate.error == math.inf
        assert estimate.interval() == (-math.inf, math.inf)
        assert estimate.p_value() == 1.0


def test_an_error_of_zero_is_taken_at_its_word() -> None:
    assert Estimate(1.0, 0.0, 5).interval() == (1.0, 1.0)
    assert (Estimate(1.0, 0.0, 5).p_value(), Estimate(0.0, 0.0, 5).p_value()) == (0.0, 1.0)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match="level must be in"):
        Estimate(0.0, 1.0, 9).interval(level)


# ---- strata and pairs --------------------------------------------------------------------------------------


def test_strata_in_exact_fractions() -> None:
    a, b = [0, 1, 1, 1, 0, 1], [3, 5, 4]
    estimate = stratified(scores("a", a) + scores("b", b) + scores("other", [100.0]), {"a": 3.0, "b": -1.0})

    def moments(values: list[int]) -> tuple[Fraction, Fraction]:
        n = len(values)
        mean = Fraction(sum(values), n)
        return mean, sum((v - mean) ** 2 for v in values) / (n - 1) / n

    (ma, va), (mb, vb) = moments(a), moments(b)
    wa, wb = Fraction(3, 4), Fraction(-1, 4)
    va, vb = wa**2 * va, wb**2 * vb
    assert estimate.mean == pytest.approx(float(wa * ma + wb * mb), rel=1e-14)
    assert estimate.error == pytest.approx(math.sqrt(va + vb), rel=1e-14)
    assert estimate.freedom == pytest.approx(float((va + vb) ** 2 / (va**2 / 5 + vb**2 / 2)), rel=1e-12)
    assert estimate.n == 9


def test_one_task_is_the_one_sample_t_test() -> None:
    from scipy import stats

    values = np.random.default_rng(1).normal(0.2, 1.0, 25)
    estimate, oracle = stratified(scores("a", values), {"a": 7.0}), stats.ttest_1samp(values, 0.0)
    assert estimate.p_value() == pytest.approx(oracle.pvalue, rel=1e-9)
    assert estimate.interval(0.9) == pytest.approx(tuple(oracle.confidence_interval(0.9)), rel=1e-9)


def test_two_tasks_of_opposite_sign_are_welchs_test() -> None:
    from scipy import stats

    generator = np.random.default_rng(2)
    a, b = generator.normal(0.3, 1.0, 14), generator.normal(0.0, 3.0, 31)
    estimate = stratified(scores("a", a) + scores("b", b), {"a": 1.0, "b": -1.0})
    oracle = stats.ttest_ind(a, b, equal_var=False)
    assert estimate.mean == pytest.approx((a.mean() - b.mean()) / 2)
    assert estimate.p_value() == pytest.approx(oracle.pvalue, rel=1e-9)


def test_pairs_are_the_paired_t_test_over_common_items_in_any_order() -> None:
    from scipy import stats

    generator = np.random.default_rng(3)
    a, b = generator.random(40), generator.random(40)
    mine, other = scores("a", a[:35]), scores("a", b[5:], start=5)[::-1]
    estimate = paired(mine, other, {"a": 1.0})
    assert estimate.n == 30
    assert estimate.p_value() == pytest.approx(stats.ttest_rel(a[5:35], b[5:35]).pvalue, rel=1e-9)
    assert paired(other, mine, {"a": 1.0}).mean == pytest.approx(-estimate.mean)


def test_pairing_is_sharper_where_items_are_shared() -> None:
    generator = np.random.default_rng(4)
    ease = generator.normal(0.0, 1.0, 300)
    a, b = ease + generator.normal(0.1, 0.2, 300), ease + generator.normal(0.0, 0.2, 300)
    both = paired(scores("a", a), scores("a", b), {"a": 1.0})
    alone = selection_bias(stratified(scores("a", a), {"a": 1.0}), stratified(scores("a", b), {"a": 1.0}))
    assert both.mean == pytest.approx(alone.mean)
    assert both.error < 0.25 * alone.error


def test_luck_is_the_difference_of_independent_estimates() -> None:
    from scipy import stats

    generator = np.random.default_rng(5)
    a, b = generator.normal(0.6, 0.5, 20), generator.normal(0.4, 0.2, 50)
    found = selection_bias(stratified(scores("a", a), {"a": 1.0}), stratified(scores("a", b), {"a": 1.0}))
    oracle = stats.ttest_ind(a, b, equal_var=False)
    assert found.p_value() == pytest.approx(oracle.pvalue, rel=1e-9)
    assert found.interval() == pytest.approx(tuple(oracle.confidence_interval()), rel=1e-9)


def test_weights_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        stratified(scores("a", [0.0, 1.0]), {"a": 0.0})


def test_intervals_cover_as_often_as_they_say() -> None:
    """2 000 samples of two tasks of 40 and 25 binary items: 3.3 standard errors about the level."""
    generator = np.random.default_rng(6)
    held = 0
    for _ in range(2000):
        items = scores("a", generator.random(40) < 0.6) + scores("b", generator.random(25) < 0.4)
        low, high = stratified(items, {"a": 2.0, "b": 1.0}).interval(0.9)
        held += low <= (2 * 0.6 + 0.4) / 3 <= high
    assert abs(held / 2000 - 0.9) < 3.3 * math.sqrt(0.09 / 2000)


# ---- Holm --------------------------------------------------------------------------------------------------


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    generator = np.random.default_rng(7)
    for _ in range(200):
        p = list(generator.random(6) ** 3)
        adjusted = holm(p)
        for alpha in (0.01, 0.05, 0.2):
            rejected: set[int] = set()
            for step, i in enumerate(sorted(range(6), key=lambda i: p[i])):  # the procedure as it is written
                if p[i] > alpha / (6 - step):
                    break
                rejected.add(i)
            assert {i for i in range(6) if adjusted[i] <= alpha} == rejected


def test_holm_keeps_the_order_given_and_refuses_what_is_no_p_value() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []
    for bad in (math.nan, -0.1, 1.5):
        with pytest.raises(ValueError, match="p-values"):
            holm([0.1, bad])


# ---- control variates --------------------------------------------------------------------------------------


def test_item_means_are_means() -> None:
    generator = np.random.default_rng(8)
    table = generator.random((5, 12))
    means = ItemMeans()
    for row in table:
        means.add(scores("a", row))
    for i in range(12):
        assert means.means["a", str(i)] == pytest.approx(table[:, i].mean())
        assert means.easiness["a", str(i)] == pytest.approx(
            (table - table.mean(axis=1, keepdims=True))[:, i].mean()
        )


def test_an_estimate_from_all_items_is_the_mean_without_error() -> None:
    generator = np.random.default_rng(9)
    values, means = generator.random(30), ItemMeans()
    for _ in range(4):
        means.add(scores("a", generator.random(30)))
    estimate = control_variate(scores("a", values), means, {"a": [str(i) for i in range(30)]}, {"a": 1.0})
    assert (estimate.mean, estimate.error) == (pytest.approx(values.mean()), 0.0)


def test_with_no_candidate_known_the_estimate_is_the_plain_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    estimate = control_variate(
        scores("a", values), ItemMeans(), {"a": [str(i) for i in range(20)]}, {"a": 1.0}
    )
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.error == pytest.approx(
        stratified(scores("a", values), {"a": 1.0}).error * math.sqrt(15 / 20)
    )


def population(generator: np.random.Generator, items: int) -> tuple[np.ndarray, ItemMeans, list[str]]:
    """(easiness of items, their means over six earlier candidates of growing skill, ids)."""
    ease, means = generator.normal(0.0, 0.3, items), ItemMeans()
    for skill in (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5):
        window = generator.permutation(items)[: items // 2]
        means.add([ItemScore("a", str(i), skill + ease[i] + generator.normal(0.0, 0.1)) for i in window])
    return ease, means, [str(i) for i in range(items)]


def test_the_estimate_is_unbiased_and_its_error_and_gain_are_true() -> None:
    """Over 400 pools: the mean is within 3.5 of its standard errors, the stated error within 15 %, half the
    plain mean's at most.
    """
    generator = np.random.default_rng(10)
    off, stated, plain = [], [], []
    for _ in range(400):
        ease, means, ids = population(generator, 80)
        values = ease + generator.normal(0.0, 0.1, 80)
        chosen = generator.permutation(80)[:20]
        items = [ItemScore("a", str(i), values[i]) for i in chosen]
        estimate = control_variate(items, means, {"a": ids}, {"a": 1.0})
        off.append(estimate.mean - values.mean())
        stated.append(estimate.error)
        plain.append(values[chosen].mean() - values.mean())
    found = float(np.std(off))
    assert abs(np.mean(off)) < 3.5 * found / 20
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(found, rel=0.15)
    assert found < 0.6 * np.std(plain)


def test_skill_that_grows_with_the_generations_is_not_taken_for_ease() -> None:
    """Windows of the pool, one a generation, each better than the last: a control by plain means would see no
    growth at all.
    """
    generator = np.random.default_rng(11)
    ease = generator.normal(0.0, 0.2, 400)
    means, seen = ItemMeans(), []
    for turn in range(8):
        window = range(50 * turn, 50 * turn + 50)
        for _ in range(6):
            seen.append(
                [ItemScore("a", str(i), 0.1 * turn + ease[i] + generator.normal(0.0, 0.05)) for i in window]
            )
            means.add(seen[-1])
    estimates = [
        control_variate(items, means, {"a": [str(i) for i in range(400)]}, {"a": 1.0}).mean for items in seen
    ]
    growth = np.polyfit(np.repeat(np.arange(8), 6), estimates, 1)[0]
    naive = [np.mean([s.value - means.means["a", s.item] for s in items]) for items in seen]
    assert growth == pytest.approx(0.1, abs=0.015)
    assert abs(np.polyfit(np.repeat(np.arange(8), 6), naive, 1)[0]) < 0.01
