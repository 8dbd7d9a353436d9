"""Gradient descent: finds a minimum, replays exactly, takes failed steps back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evomerge.optimizers.base import Array
from evomerge.optimizers.descent import Descent

TARGET = np.array([0.3, -0.8, 1.7])


def gradient(x: Array) -> list[float]:
    return list(2 * (x - TARGET) * np.array([1.0, 100.0, 0.01]))


def test_it_finds_a_minimum_whatever_the_scale_of_each_gene() -> None:
    descent = Descent([0.0, 0.0, 1.0], rate=0.1, steps=100)
    for _ in range(100):
        descent.tell(gradient(descent.ask()))
    assert np.abs(descent.ask() - TARGET).max() < 0.02


def test_the_same_gradients_give_the_same_genomes() -> None:
    runs = []
    for _ in range(2):
        descent = Descent([0.0, 0.0, 1.0], rate=0.1, steps=10)
        genomes = []
        for _ in range(10):
            genomes.append(descent.ask())
            descent.tell(gradient(genomes[-1]))
        runs.append(np.stack(genomes))
    assert np.array_equal(*runs)


def test_the_first_step_has_the_rate_for_every_gene_and_the_last_none() -> None:
    descent = Descent([0.0, 0.0], rate=0.125, steps=4)
    descent.tell([5.0, -0.001])
    assert descent.ask() == pytest.approx([-0.125, 0.125], abs=1e-4)
    for _ in range(10):
        descent.tell([1.0, 1.0])
    before = descent.ask()
    descent.tell([1.0, 1.0])
    assert np.array_equal(descent.ask(), before)


def test_a_failed_step_is_taken_back_by_half() -> None:
    descent = Descent([0.0], rate=0.5, steps=4)
    descent.tell([1.0])
    assert descent.ask() == pytest.approx([-0.5])
    descent.tell(None)
    assert descent.ask() == pytest.approx([-0.25])
    descent.tell(None)
    assert descent.ask() == pytest.approx([-0.125])


@pytest.mark.parametrize("bad", [[1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_what_is_no_gradient_is_refused(bad: list[float]) -> None:
    descent = Descent([0.0, 0.0], rate=0.1, steps=4)
    with pytest.raises(ValueError, match="2 finite numbers"):
        descent.tell(bad)


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 4), (-1.0, 4), (math.nan, 4), (0.1, 0)])
def test_settings_out_of_range_are_refused(rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match="rate above 0"):
        Descent([0.0], rate=rate, steps=steps)
