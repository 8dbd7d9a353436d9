"""Gradient descent: finds a minimum, replays exactly, takes failed steps back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evomerge.optimizers.base import Array
from evomerge.optimizers.descent import Descent, Leash

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


def path(leash: Leash | None, steps: int = 30) -> np.ndarray:
    """[steps + 1, n] the genomes of a descent whose gradient changes its sign now and then."""
    descent = Descent([0.5, -0.25, 1.0], rate=0.2, steps=steps, leash=leash)
    generator = np.random.default_rng(1)
    found = [descent.ask()]
    for _ in range(steps):
        descent.tell(list(generator.normal(size=3) + np.array([1.0, -2.0, 0.1])))
        found.append(descent.ask())
    return np.stack(found)


def test_a_leash_of_nothing_changes_no_genome() -> None:
    assert np.array_equal(path(None), path(Leash(decay=0.0)))
    assert not np.array_equal(path(None), path(Leash(decay=0.5)))


@pytest.mark.parametrize("trust", [0.25, 0.0625])
def test_no_gene_leaves_the_trust_region(trust: float) -> None:
    found = path(Leash(trust=trust))
    assert np.abs(found - found[0]).max() <= trust
    assert np.abs(found - found[0]).max() == trust, "it never came to the bound"


def test_the_root_mean_square_of_all_genes_is_bounded() -> None:
    found = path(Leash(trust_rms=0.125))
    rms = np.sqrt(((found - found[0]) ** 2).mean(axis=1))
    assert rms.max() <= 0.125 + 2**-14
    assert np.abs(found - found[0]).max() > 0.125


def test_decay_without_a_gradient_goes_back_to_the_start_as_a_geometric_series() -> None:
    descent = Descent([1.0], rate=0.5, steps=10**9, leash=Leash(decay=0.5))
    descent.tell([1.0])
    away = [float(descent.ask()[0]) - 1.0]
    for _ in range(2000):
        descent.tell([0.0])
    assert away[0] == pytest.approx(-0.5)
    assert float(descent.ask()[0]) == pytest.approx(1.0, abs=1e-3)
