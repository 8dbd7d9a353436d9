"""Losses of items: their values said a second time, their slopes against central differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from evomerge.evaluation.surrogates import SURROGATES, ItemLoss, Surrogate, of_answers, of_choices, of_text

SUMS = [-2.5, -0.7, -3.1, -1.9]
STEP = 1e-6


def check_slopes(loss: Callable[[list[float]], ItemLoss], sums: list[float]) -> None:
    found = loss(sums)
    for i in range(len(sums)):
        ends = [loss([*sums[:i], sums[i] + step, *sums[i + 1 :]]).loss for step in (STEP, -STEP)]
        assert found.slopes[i] == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("right", [[1], [0, 3], [0, 1, 2, 3]])
def test_a_choice_is_the_probability_of_the_right_ones_among_all(
    surrogate: Surrogate, right: list[int]
) -> None:
    found = of_choices(SUMS, right, surrogate)
    probability = sum(math.exp(SUMS[i]) for i in right) / sum(map(math.exp, SUMS))
    assert found.probability == pytest.approx(probability)
    assert found.logprob == pytest.approx(math.log(probability), abs=1e-12)
    if surrogate != "margin":
        wanted = -math.log(probability) if surrogate == "logprob" else 1 - probability
        assert found.loss == pytest.approx(wanted, abs=1e-12)
    check_slopes(lambda sums: of_choices(sums, right, surrogate), SUMS)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_an_answer_is_the_probability_that_one_of_the_right_texts_is_generated(surrogate: Surrogate) -> None:
    found = of_answers(SUMS, surrogate)
    probability = sum(map(math.exp, SUMS))
    assert found.probability == pytest.approx(probability)
    check_slopes(lambda sums: of_answers(sums, surrogate), SUMS)


@pytest.mark.parametrize("right", [[1], [0, 3], [2]])
def test_a_margin_is_the_probability_of_the_likeliest_right_choice_beside_the_likeliest_wrong_one(
    right: list[int],
) -> None:
    """It is below a half exactly where the metric finds the answer right."""
    found = of_choices(SUMS, right, "margin")
    best = math.exp(max(SUMS[i] for i in right))
    rival = math.exp(max(SUMS[i] for i in range(4) if i not in right))
    assert found.loss == pytest.approx(rival / (best + rival))
    assert (found.loss < 0.5) == (SUMS.index(max(SUMS)) in right)
    assert sum(slope != 0 for slope in found.slopes) == 2


def test_a_margin_of_choices_that_are_all_right_or_far_apart_is_a_number() -> None:
    assert of_choices(SUMS, [0, 1, 2, 3], "margin").loss == 0.0
    assert of_choices([-2000.0, -1.0], [0], "margin").loss == 1.0
    assert of_choices([-2000.0, -1.0], [1], "margin").loss == 0.0


def test_a_margin_of_an_answer_over_all_other_texts_is_its_probability() -> None:
    assert of_answers(SUMS, "margin") == of_answers(SUMS, "probability")
    assert of_text(-12.0, 4).loss == 3.0


def test_an_improbable_answer_has_a_finite_loss_whose_slope_does_not_vanish() -> None:
    found = of_answers([-900.0], "logprob")
    assert (found.loss, found.slopes, found.probability) == (900.0, (-1.0,), 0.0)
    assert of_answers([-900.0], "probability").slopes == (0.0,)


def test_a_text_is_the_mean_of_its_tokens() -> None:
    assert of_text(-12.0, 4) == ItemLoss(3.0, (-0.25,), None, -3.0)
