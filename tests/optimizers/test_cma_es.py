"""CMA-ES: reproducible to the bit, deaf to everything around it, and the algorithm it says it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.pending import GRID
from tests.support.toy import environment

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


# ---- reproducible ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score", [bowl, coarse, lambda x: None if x[0] > 0.1 else bowl(x)], ids=["smooth", "ties", "failures"]
)
def test_the_same_seed_gives_the_same_search(make: Callable[..., CmaEs], score: Score) -> None:
    assert same(run(make(), 12, score), run(make(), 12, score))


def test_another_seed_gives_another_search(make: Callable[..., CmaEs]) -> None:
    assert not same(run(make(3), 1), run(make(4), 1))


def test_others_who_draw_change_nothing(make: Callable[..., CmaEs]) -> None:
    def noise() -> None:
        np.random.seed(7)
        np.random.standard_normal(1001)

    assert same(run(make(), 12, between=noise), run(make(), 12))


def test_two_searches_side_by_side_do_not_mix(make: Callable[..., CmaEs]) -> None:
    one, two = make(3), make(4)
    pairs = [(run(one, 1)[0], run(two, 1)[0]) for _ in range(8)]
    assert same([a for a, _ in pairs], run(make(3), 8))
    assert same([b for _, b in pairs], run(make(4), 8))


def test_the_global_generator_stays_where_it_is(make: Callable[..., CmaEs]) -> None:
    def state() -> tuple[object, ...]:
        name, keys, *rest = np.random.get_state()
        return (name, keys.tobytes(), *rest)

    np.random.seed(11)
    np.random.standard_normal()  # leaves a cached second number
    before = state()
    es = make()
    assert state() == before
    es.inject([[0.1] * len(es.mean)])
    assert state() == before
    genomes = es.ask()
    assert state() == before
    es.tell(genomes, [bowl(g) for g in genomes])
    assert state() == before
    assert es.mean.shape == es.deviations.shape
    assert state() == before


PROGRAM = """
import json, sys
import numpy as np
np.random.seed(5)
before = np.random.get_state()[1].tobytes()
from evomerge.optimizers.cma_es import CmaEs
es = CmaEs([0.0] * 6, 0.3, population=8, seed=3)
assert np.random.get_state()[1].tobytes() == before, "making the optimizer moved numpy's generator"
for line in sys.stdin:
    genomes = es.ask()
    print(json.dumps(genomes.tolist()))
    es.tell(genomes, json.loads(line))
print(json.dumps(es.ask().tolist()))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_replay_in_a_fresh_process_is_exact(threads: str, tmp_path: Path) -> None:
    """What resume rests on: the stored scores alone bring a new process to the same point, from an empty folder."""
    es = MAKES["full"]()
    asked, told = [], []
    for _ in range(10):
        genomes = es.ask()
        asked.append(genomes.tolist())
        told.append([coarse(g) if i % 5 else None for i, g in enumerate(genomes)])
        es.tell(genomes, told[-1])
    asked.append(es.ask().tolist())
    lines = "".join(json.dumps(scores) + "\n" for scores in told)
    env = environment() | {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONHASHSEED": threads,
    }
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        program, input=lines, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == asked
    assert list(tmp_path.iterdir()) == []


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


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7, 20, 100])
def test_the_population_is_hansens_default(n: int) -> None:
    assert CmaEs([0.0] * n, 0.1).ask().shape == (4 + math.floor(3 * math.log(n)), n)


@pytest.mark.parametrize("population", [4, 5, 16, 33])
def test_the_population_is_what_was_asked_for(population: int) -> None:
    es = CmaEs([0.0] * 5, 0.1, population=population)
    for genomes in run(es, 3):
        assert genomes.shape == (population, 5)


def test_genomes_lie_on_the_grid(make: Callable[..., CmaEs]) -> None:
    for genomes in run(make(), 5):
        assert np.array_equal(genomes / GRID, np.round(genomes / GRID))
    mean = make().mean
    assert np.array_equal(mean / GRID, np.round(mean / GRID))


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


# ---- what is told ----------------------------------------------------------------------------------------------------


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


def test_flat_scores_do_not_stop_the_search(make: Callable[..., CmaEs]) -> None:
    es = make()
    for genomes in run(es, 200, lambda x: 0.25):
        assert np.isfinite(genomes).all()
        assert len(np.unique(genomes, axis=0)) > 1


def test_the_mean_is_the_weighted_mean_of_the_best(make: Callable[..., CmaEs]) -> None:
    """Hansen 2016, eq. 41-42: m <- sum_i w_i x_(i:lambda) over the mu best of the points asked, for many seeds."""
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
    """Scores of few items tie. The slots returned as recombined are those that moved the mean, ties in slot order."""
    es = CmaEs([0.0] * 10, 0.3, population=population, seed=5)
    for generation in range(30):
        asked = es.ask().copy()
        scores = [float((i * 7 + generation) % 3) for i in range(population)]
        recombined = es.tell(asked, list(scores))
        weights = np.asarray(es._es.sp.weights)
        weights = weights[weights > 0]
        assert recombined == sorted(range(population), key=lambda i: (-scores[i], i))[: len(weights)]
        assert np.allclose(es.mean, weights @ asked[recombined], atol=GRID), f"generation {generation}"


def test_only_the_order_of_scores_counts(make: Callable[..., CmaEs]) -> None:
    assert same(run(make(), 10), run(make(), 10, lambda x: 1e-6 * bowl(x) - 5))
    assert same(run(make(), 10), run(make(), 10, lambda x: math.exp(bowl(x) / 1000)))


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


def test_failures_of_a_whole_generation_do_not_break_it(make: Callable[..., CmaEs]) -> None:
    es = make()
    run(es, 3, lambda x: None)
    assert all(np.isfinite(g).all() for g in run(es, 3))


def test_a_search_with_failures_still_climbs() -> None:
    counter = iter(range(10**6))
    es = CmaEs([0.0] * 6, 0.3, seed=2)
    run(es, 200, lambda x: None if next(counter) % 5 == 0 else bowl(x))
    assert np.abs(es.mean - 0.5).max() < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(bad: float, make: Callable[..., CmaEs]) -> None:
    es, twin = make(), make()
    genomes = es.ask()
    scores = [bowl(g) for g in genomes]
    with pytest.raises(ValueError, match="finite"):
        es.tell(genomes, [*scores[:-1], bad])
    es.tell(genomes, list(scores))  # and nothing was learnt from it
    twin.tell(twin.ask(), list(scores))
    assert np.array_equal(es.ask(), twin.ask())


def test_tell_takes_what_was_asked_and_leaves_it_alone(make: Callable[..., CmaEs]) -> None:
    es = make()
    with pytest.raises(ValueError, match="oldest ask"):
        es.tell(np.zeros((8, len(es.mean))), [0.0] * 8)
    for seed in range(20):
        es = make(seed)
        genomes = es.ask()
        kept = genomes.copy()
        with pytest.raises(ValueError, match="oldest ask"):
            es.tell(genomes + GRID, [bowl(g) for g in genomes])
        with pytest.raises(ValueError, match=r"\w"):
            es.tell(genomes, [0.0])
        scores = [bowl(g) for g in genomes]
        told = list(scores)
        es.tell(genomes, told)
        assert np.array_equal(genomes, kept)
        assert told == scores


# ---- what is injected ------------------------------------------------------------------------------------------------


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


def test_injection_is_part_of_the_replay(make: Callable[..., CmaEs]) -> None:
    def injected() -> list[np.ndarray]:
        es = make()
        es.inject([[0.2] * len(es.mean), [1.0] * len(es.mean)])
        return run(es, 6)

    assert same(injected(), injected())
    assert not same(injected(), run(make(), 6))
