"""CMA-ES: the algorithm it says it is; what all optimizers have in common is in tests/contracts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.pending import GRID

Score = Callable[[np.ndarray], "float | None"]


def bowl(x: np.ndarray) -> float:
    """An ellipsoid of condition 100 around (.5, .5, …), highest there."""
    scale = np.logspace(0, 1, len(x))
    return -float(np.sum((scale * (x - 0.5)) ** 2))


def coarse(x: np.ndarray) -> float:
    """Accuracy on few items: many ties."""
    return round(4 * math.exp(bowl(x) / 50)) / 4


def run(
    es: CmaEs, generations: int, score: Score = bowl, between: Callable[[], object] = lambda: None
) -> list[np.ndarray]:
    asked = []
    for _ in range(generations):
        between()
        genomes = es.ask()
        asked.append(genomes.copy())
        between()
        es.tell(genomes, [score(g) for g in genomes])
    return asked


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


MAKES = {
    "full": lambda seed=3: CmaEs([0.0] * 6, 0.3, population=8, seed=seed),
    "diagonal": lambda seed=3: CmaEs([0.0] * 6, 0.3, population=8, diagonal=True, seed=seed),
    "one gene": lambda seed=3: CmaEs([0.0], 0.3, population=8, seed=seed),
    "many": lambda seed=3: CmaEs([0.0] * 40, 0.3, population=24, seed=seed),
}


@pytest.fixture(params=MAKES)
def make(request: pytest.FixtureRequest) -> Callable[..., CmaEs]:
    return MAKES[request.param]


# ---- files -------------------------------------------------------------------------------------------------


def test_nothing_is_written_and_no_file_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = run(MAKES["full"](), 5)
    assert os.listdir(tmp_path) == []
    for name in ("cma_signals.in", "signals.in"):
        (tmp_path / name).write_text("stop_now: True\nsigma: 5\n{'stop_now': True, 'verbose': 9}\n")
    kept = sorted(os.listdir(tmp_path))
    assert same(run(MAKES["full"](), 5), expected)
    assert sorted(os.listdir(tmp_path)) == kept
    assert capfd.readouterr() == ("", "")


# ---- what is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_first_sample_has_the_start_and_deviation_that_were_given(diagonal: bool) -> None:
    start = np.linspace(-1, 1, 10)
    es = CmaEs(start, 0.25, population=4000, diagonal=diagonal)
    assert np.allclose(es.mean, start, atol=GRID)
    z = (es.ask() - start) / 0.25  # [4000, 10], standard normal
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(4000)
    assert np.abs(z.std(axis=0) - 1).max() < 5 / math.sqrt(8000)
    assert np.abs(np.corrcoef(z.T) - np.eye(10)).max() < 5 / math.sqrt(4000)


def test_one_gene_is_searched() -> None:
    es = CmaEs([0.0], 0.3, population=6, seed=1)
    for genomes in run(es, 40):
        assert genomes.shape == (6, 1)
    assert es.mean.shape == es.deviations.shape == (1,)
    assert abs(es.mean[0] - 0.5) < 0.01


# ---- what is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("n", "generations"), [(2, 60), (5, 100), (20, 300)])
def test_it_climbs_a_shifted_ellipsoid(n: int, generations: int, diagonal: bool) -> None:
    es = CmaEs([0.0] * n, 0.3, diagonal=diagonal, seed=2)
    run(es, generations)
    assert bowl(es.mean) > 1e-3 * bowl(np.zeros(n))
    assert es.deviations.max() < 0.05


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_a_search_that_has_converged_stays_where_it_is(n: int, diagonal: bool) -> None:
    """Steps shorter than the grid must not make the distribution degenerate."""
    es = CmaEs([0.0] * n, 0.3, diagonal=diagonal, seed=2)
    for generation, genomes in enumerate(run(es, 400)):
        assert np.isfinite(genomes).all()
        assert np.abs(genomes - 0.5).max() < 0.05 or generation < 150
    assert np.abs(es.mean - 0.5).max() < 0.01


def test_the_mean_is_the_weighted_mean_of_the_best(make: Callable[..., CmaEs]) -> None:
    """Hansen 2016, eq.

    41-42: m <- sum_i w_i x_(i:lambda) over the mu best of the points asked, for many seeds.
    """
    for seed in range(40):
        es = make(seed)
        asked = es.ask().copy()
        scores = [bowl(g) for g in asked]
        recombined = es.tell(asked, list(scores))
        weights = np.asarray(es._es.sp.weights)
        weights = weights[weights > 0]
        best = sorted(range(len(asked)), key=lambda i: -scores[i])[: len(weights)]
        assert recombined == best
        assert np.allclose(es.mean, weights @ asked[best], atol=GRID), f"seed {seed}"
        assert weights.sum() == pytest.approx(1)
        assert len(weights) == len(asked) // 2


@pytest.mark.parametrize("population", [8, 24, 100])
def test_of_equal_scores_the_slots_decide(population: int) -> None:
    """Scores of few items tie.

    The slots returned as recombined are those that moved the mean, ties in slot order.
    """
    es = CmaEs([0.0] * 10, 0.3, population=population, seed=5)
    for generation in range(30):
        asked = es.ask().copy()
        scores = [float((i * 7 + generation) % 3) for i in range(population)]
        recombined = es.tell(asked, list(scores))
        weights = np.asarray(es._es.sp.weights)
        weights = weights[weights > 0]
        assert recombined == sorted(range(population), key=lambda i: (-scores[i], i))[: len(weights)]
        assert np.allclose(es.mean, weights @ asked[recombined], atol=GRID), f"generation {generation}"


def test_failed_candidates_rank_last(make: Callable[..., CmaEs]) -> None:
    def failing(x: np.ndarray) -> float | None:
        return None if x[0] > 0.05 else bowl(x)

    def worst(x: np.ndarray) -> float:
        return -1e9 if x[0] > 0.05 else bowl(x)

    assert same(run(make(), 10, failing), run(make(), 10, worst))
    es = make()
    genomes = es.ask()
    scores = [None if i % 3 == 0 else bowl(g) for i, g in enumerate(genomes)]
    alive = [i for i, s in enumerate(scores) if s is not None]
    assert set(es.tell(genomes, scores)[: len(alive)]) <= set(alive)


def test_a_search_with_failures_still_climbs() -> None:
    counter = iter(range(10**6))
    es = CmaEs([0.0] * 6, 0.3, seed=2)
    run(es, 200, lambda x: None if next(counter) % 5 == 0 else bowl(x))
    assert np.abs(es.mean - 0.5).max() < 0.05


# ---- what is injected --------------------------------------------------------------------------------------


def test_injected_genomes_come_first_in_their_direction(make: Callable[..., CmaEs]) -> None:
    es = make()
    n = len(es.mean)
    near, far = [[0.1 * (-1) ** i for i in range(n)], [3.0] * n]
    es.inject([near, far])
    genomes = es.ask()
    assert genomes.shape == make().ask().shape
    for genome, wanted in zip(genomes, (near, far), strict=False):
        along = float(genome @ wanted / np.dot(wanted, wanted))
        assert 0 < along <= 1 + 1e-9 + GRID / np.abs(wanted).max()
        assert np.abs(genome - along * np.asarray(wanted)).max() <= GRID
    length = float(np.linalg.norm(genomes[1])) / 0.3  # in standard deviations
    assert length < math.sqrt(n) + 3, "a long step is shortened to one the distribution would take"


def test_the_mean_itself_may_be_injected(make: Callable[..., CmaEs]) -> None:
    """As a search does that starts at its best hand recipe."""
    es = make()
    es.inject([es.mean.tolist()] * 2)
    genomes = es.ask()
    assert np.isfinite(genomes).all()
    assert np.abs(genomes[0] - es.mean).max() < 3 * 0.3
    es.tell(genomes, [bowl(g) for g in genomes])
    assert all(np.isfinite(g).all() for g in run(es, 5))


def test_a_good_injected_genome_is_learnt_from() -> None:
    plain, helped = CmaEs([0.0] * 20, 0.1, seed=1), CmaEs([0.0] * 20, 0.1, seed=1)
    helped.inject([[0.5] * 20])
    for es in (plain, helped):
        run(es, 1)
    assert bowl(helped.mean) > bowl(plain.mean)
