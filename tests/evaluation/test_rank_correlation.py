"""Spearman's rank correlation against scipy's."""

from __future__ import annotations

import random

import pytest
from scipy.stats import spearmanr

from evomerge.evaluation.rank_correlation import spearman


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_scipys(ties: bool) -> None:
    numbers = random.Random(3)
    for n in (2, 3, 5, 17, 40):
        first = [numbers.random() for _ in range(n)]
        second = [x + numbers.random() for x in first]
        if ties:
            first, second = [[round(4 * x) for x in values] for values in (first, second)]
        found = spearman(first, second)
        if len(set(first)) == 1 or len(set(second)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(float(spearmanr(first, second)[0]), abs=1e-12)


def test_what_has_no_order_has_no_correlation() -> None:
    assert spearman([], []) is None
    assert spearman([1.0], [2.0]) is None
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == -1.0
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        spearman([1.0], [1.0, 2.0])
