"""Laws that every optimizer of the registry obeys: deterministic, replayable, and exact about what it asks
and learns.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.optimizers import (
    OPTIMIZERS,
    Array,
    Optimizer,
    OptimizerSettings,
    default_population,
    is_diagonal,
    optimizer_for,
)
from evomerge.optimizers.pending import GRID
from tests.support.toy import environment

Score = Callable[[Array], "float | None"]
COUNTS = (4, 2, 3, 5, 4, 4, 3, 2)
POPULATION = 12


@dataclass(frozen=True)
class Case:
    """An optimizer on genomes of a kind."""

    name: str
    start: tuple[float, ...]
    settings: OptimizerSettings

    def make(self, seed: int = 3, population: int | None = POPULATION) -> Optimizer:
        settings = replace(self.settings, seed=seed, population=population)
        return OPTIMIZERS[self.name].make(self.start, settings)

    @property
    def categories(self) -> int:
        return len(self.settings.categories)


def cases() -> dict[str, Case]:
    """Every optimizer of the registry on every kind of genome that it takes."""
    numbers = OptimizerSettings(sigma=0.3)
    choices = OptimizerSettings(sigma=1.0, categories=COUNTS, keep_probability=0.75)
    found: dict[str, Case] = {}
    for name, entry in OPTIMIZERS.items():
        if entry.takes_numbers:
            found[f"{name}, numbers"] = Case(name, (0.0,) * 6, numbers)
            found[f"{name}, one number"] = Case(name, (0.0,), numbers)
            found[f"{name}, many numbers"] = Case(name, (0.0,) * 40, numbers)
        if entry.learns_covariance:
            found[f"{name}, diagonal"] = Case(name, (0.0,) * 6, replace(numbers, diagonal=True))
        if entry.takes_categories:
            found[f"{name}, mixed"] = Case(name, (0.0,) * 14, choices)
            found[f"{name}, choices and one number"] = Case(name, (0.0,) * 9, choices)
            found[f"{name}, choices"] = Case(name, (1.0,) * 8, choices)
    return found


CASES = cases()
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def hidden(x: Array) -> float:
    """Right categories, less the distance of all genes from .5: a number for every genome, and few that are
    equal.
    """
    wanted = [(3 * i + 1) % k for i, k in enumerate(COUNTS)]
    right = float(np.sum(x[: len(COUNTS)] == wanted[: len(x)]))
    return right - float(np.sum(np.linspace(1, 2, len(x)) * (x - 0.5) ** 2))


def coarse(x: Array) -> float:
    """Accuracy on few items: many ties."""
    return round(hidden(x) / 2) / 4


def failing(x: Array) -> float | None:
    """A part of the space cannot be scored."""
    return None if x[0] > 0.2 else hidden(x)


def run(
    optimizer: Optimizer,
    generations: int,
    score: Score = hidden,
    between: Callable[[], object] = lambda: None,
) -> list[Array]:
    """The generations of a search."""
    generations_asked = []
    for _ in range(generations):
        between()
        genomes = optimizer.ask()
        generations_asked.append(genomes.copy())
        between()
        optimizer.tell(genomes, [score(g) for g in genomes])
    return generations_asked


def same(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def order_of(scores: Sequence[float | None]) -> list[int]:
    """Slots, best first; of equal scores the earlier, failed ones last."""
    scored = sorted(
        (i for i, s in enumerate(scores) if s is not None), key=lambda i: (-(scores[i] or 0.0), i)
    )
    return scored + [i for i, s in enumerate(scores) if s is None]


def injected(case: Case) -> list[list[float]]:
    """Two genomes a short step away from the start."""
    lead, numbers = case.categories, len(case.start) - case.categories
    return [
        [float(k - 1) for k in COUNTS[:lead]] + [0.125 * (-1) ** i for i in range(numbers)],
        [0.0] * lead + [-0.125] * numbers,
    ]


# ---- deterministic -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("score", [hidden, coarse, failing], ids=["smooth", "ties", "failures"])
def test_the_same_tells_give_the_same_asks(case: Case, score: Score) -> None:
    one, other = case.make(), case.make()
    assert same(run(one, 20, score), run(other, 20, score))
    assert np.array_equal(one.mean, other.mean)


@every
def test_another_seed_gives_another_search(case: Case) -> None:
    assert not same(run(case.make(3), 1), run(case.make(4), 1))


@every
def test_two_searches_side_by_side_do_not_mix(case: Case) -> None:
    one, two = case.make(3), case.make(4)
    pairs = [(run(one, 1)[0], run(two, 1)[0]) for _ in range(8)]
    assert same([a for a, _ in pairs], run(case.make(3), 8))
    assert same([b for _, b in pairs], run(case.make(4), 8))


@every
def test_draws_of_others_from_numpys_generator_change_nothing(case: Case) -> None:
    def noise() -> None:
        np.random.seed(7)
        np.random.standard_normal(1001)

    assert same(run(case.make(), 12, between=noise), run(case.make(), 12))


@every
def test_numpys_generator_is_left_where_it_is(case: Case) -> None:
    def state() -> tuple[object, ...]:
        name, keys, *rest = np.random.get_state()
        return (name, keys.tobytes(), *rest)

    np.random.seed(11)
    np.random.standard_normal()  # leaves a cached second number
    before = state()
    optimizer = case.make()
    assert state() == before
    optimizer.inject(injected(case)[:1])
    assert state() == before
    genomes = optimizer.ask()
    assert state() == before
    optimizer.tell(genomes, [hidden(g) for g in genomes])
    assert state() == before
    assert optimizer.mean.shape == (len(case.start),)
    assert state() == before


PROGRAM = """
import json, sys
import numpy as np
np.random.seed(5)
before = np.random.get_state()[1].tobytes()
from evomerge.optimizers import OPTIMIZERS, OptimizerSettings
replayed = {}
for label, case in json.load(sys.stdin).items():
    settings = OptimizerSettings(**{**case["settings"], "categories": tuple(case["settings"]["categories"])})
    optimizer = OPTIMIZERS[case["name"]].make(case["start"], settings)
    assert np.random.get_state()[1].tobytes() == before, "making the optimizer moved numpy's generator"
    optimizer.inject(case["injected"])
    replayed[label] = []
    for scores in case["scores"]:
        genomes = optimizer.ask()
        replayed[label].append(genomes.tolist())
        optimizer.tell(genomes, scores)
    replayed[label].append(optimizer.ask().tolist())
print(json.dumps(replayed))
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_replay_in_a_fresh_process_is_exact(threads: str, tmp_path: Path) -> None:
    """What resume rests on: the stored scores alone bring a new process to the same point, from an empty
    folder.
    """
    stored, asked = {}, {}
    for label, case in CASES.items():
        optimizer = case.make()
        optimizer.inject(injected(case))
        asked[label], scores = [], []
        for _ in range(15):
            genomes = optimizer.ask()
            asked[label].append(genomes.tolist())
            scores.append([coarse(g) if i % 5 else None for i, g in enumerate(genomes)])
            optimizer.tell(genomes, list(scores[-1]))
        asked[label].append(optimizer.ask().tolist())
        settings = case.settings
        stored[label] = {
            "name": case.name,
            "start": case.start,
            "injected": injected(case),
            "scores": scores,
            "settings": {
                "sigma": settings.sigma,
                "population": POPULATION,
                "seed": 3,
                "diagonal": settings.diagonal,
                "categories": settings.categories,
                "keep_probability": settings.keep_probability,
            },
        }
    env = environment() | {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONHASHSEED": threads,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(stored),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == asked
    assert list(tmp_path.iterdir()) == [], "nothing is written"


# ---- asked genomes -----------------------------------------------------------------------------------------


@every
def test_genomes_are_finite_of_the_right_shape_and_on_the_grid(case: Case) -> None:
    optimizer, lead = case.make(), case.categories
    for genomes in run(optimizer, 30):
        assert genomes.shape == (POPULATION, len(case.start))
        assert np.isfinite(genomes).all()
        assert np.array_equal(genomes / GRID, np.round(genomes / GRID))
        rows = genomes[:, :lead]
        assert all(g in range(k) for row in rows for g, k in zip(row, COUNTS[:lead], strict=True))
    mean = optimizer.mean
    assert mean.shape == (len(case.start),)
    assert np.array_equal(mean / GRID, np.round(mean / GRID))
    assert all(g in range(k) for g, k in zip(mean[:lead], COUNTS[:lead], strict=True))
    assert 0 <= optimizer.mu <= POPULATION


@every
@pytest.mark.parametrize("population", [4, 5, 16, 33])
def test_the_population_is_what_was_requested(case: Case, population: int) -> None:
    for genomes in run(case.make(population=population), 3):
        assert genomes.shape == (population, len(case.start))


@every
def test_a_population_that_is_not_named_is_hansens(case: Case) -> None:
    n = len(case.start)
    genomes = case.make(population=None).ask()
    assert len(genomes) == default_population(n) == 4 + math.floor(3 * math.log(max(2, n)))


@every
def test_the_caller_may_change_what_mean_and_ask_return(case: Case) -> None:
    one, other = case.make(), case.make()
    one.mean[:] = 7.0
    genomes = one.ask()
    kept = genomes.copy()
    genomes[:] = 7.0
    one.tell(kept, [hidden(g) for g in kept])
    run(other, 1)
    assert np.array_equal(one.ask(), other.ask())


# ---- told scores -------------------------------------------------------------------------------------------


@every
def test_only_the_order_of_scores_counts(case: Case) -> None:
    assert same(run(case.make(), 15), run(case.make(), 15, lambda x: 1e-6 * hidden(x) - 5))
    assert same(run(case.make(), 15), run(case.make(), 15, lambda x: math.exp(hidden(x) / 1000)))


@every
def test_the_recombined_slots_are_the_best_and_of_equal_scores_the_earlier(case: Case) -> None:
    optimizer = case.make()
    for generation in range(20):
        genomes = optimizer.ask()
        scores: list[float | None] = [float((i * 7 + generation) % 3) for i in range(POPULATION)]
        recombined = optimizer.tell(genomes, list(scores))
        assert len(recombined) <= optimizer.mu
        if len(np.unique(genomes, axis=0)) == POPULATION:  # else equal genomes may count once
            assert recombined == order_of(scores)[: optimizer.mu]


@every
def test_failed_candidates_rank_last(case: Case) -> None:
    optimizer = case.make()
    genomes = optimizer.ask()
    scores = [None if i % 3 == 0 else hidden(g) for i, g in enumerate(genomes)]
    alive = [i for i, s in enumerate(scores) if s is not None]
    recombined = optimizer.tell(genomes, scores)
    assert set(recombined[: len(alive)]) <= set(alive)
    assert recombined == order_of(scores)[: len(recombined)]


@every
def test_failures_of_a_whole_generation_do_not_break_it(case: Case) -> None:
    optimizer = case.make()
    run(optimizer, 3, lambda x: None)
    assert all(np.isfinite(g).all() for g in run(optimizer, 3))


@every
def test_flat_scores_do_not_stop_the_search(case: Case) -> None:
    for genomes in run(case.make(), 200, lambda x: 0.25):
        assert np.isfinite(genomes).all()
        assert len(np.unique(genomes, axis=0)) > 1


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(case: Case, bad: float) -> None:
    optimizer, twin = case.make(), case.make()
    genomes = optimizer.ask()
    scores: list[float | None] = [hidden(g) for g in genomes]
    with pytest.raises(ValueError, match="finite"):
        optimizer.tell(genomes, [*scores[:-1], bad])
    optimizer.tell(genomes, scores)  # and nothing was learnt from it
    twin.tell(twin.ask(), list(scores))
    assert np.array_equal(optimizer.ask(), twin.ask())


@every
def test_tell_takes_what_was_asked_and_leaves_it_alone(case: Case) -> None:
    optimizer = case.make()
    with pytest.raises(ValueError, match="oldest ask"):
        optimizer.tell(np.zeros((POPULATION, len(case.start))), [0.0] * POPULATION)
    for seed in range(10):
        optimizer = case.make(seed)
        genomes = optimizer.ask()
        kept = genomes.copy()
        with pytest.raises(ValueError, match="oldest ask"):
            optimizer.tell(genomes + GRID, [hidden(g) for g in genomes])
        with pytest.raises(ValueError, match="oldest ask"):
            optimizer.tell(genomes, [0.0])
        scores: list[float | None] = [hidden(g) for g in genomes]
        told = list(scores)
        optimizer.tell(genomes, told)
        assert np.array_equal(genomes, kept)
        assert told == scores


@every
def test_two_generations_may_be_asked_ahead_and_are_told_in_their_order(case: Case) -> None:
    def ahead(optimizer: Optimizer) -> list[Array]:
        asked = [optimizer.ask(), optimizer.ask()]
        for number in range(8):
            optimizer.tell(asked[number], [hidden(g) for g in asked[number]])
            asked.append(optimizer.ask())
        return asked

    assert same(ahead(case.make()), ahead(case.make()))
    optimizer = case.make()
    first, second = optimizer.ask(), optimizer.ask()
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="oldest ask"):
        optimizer.tell(second, [hidden(g) for g in second])
    optimizer.tell(first, [hidden(g) for g in first])
    with pytest.raises(ValueError, match="oldest ask"):
        optimizer.tell(first, [hidden(g) for g in first])
    optimizer.tell(second, [hidden(g) for g in second])


# ---- injected genomes --------------------------------------------------------------------------------------


@every
def test_injected_genomes_come_first_as_they_are_or_in_their_direction(case: Case) -> None:
    optimizer, lead = case.make(), case.categories
    start = np.asarray(case.start)[lead:]
    first, second = injected(case)
    optimizer.inject([first, second])
    genomes = optimizer.ask()
    assert genomes.shape == (POPULATION, len(case.start))
    for genome, wanted in zip(genomes, (first, second), strict=False):
        assert np.array_equal(genome[:lead], wanted[:lead])
        step, whole = genome[lead:] - start, np.asarray(wanted)[lead:] - start
        if len(whole):
            along = float(step @ whole / (whole @ whole))
            assert 0 < along <= 1 + GRID / np.abs(whole).max()
            assert np.abs(step - along * whole).max() <= GRID


@every
def test_injection_is_part_of_the_replay(case: Case) -> None:
    def with_injection() -> list[Array]:
        optimizer = case.make()
        optimizer.inject(injected(case))
        return run(optimizer, 8)

    assert same(with_injection(), with_injection())
    assert not same(with_injection(), run(case.make(), 8))


# ---- the registry ------------------------------------------------------------------------------------------


def test_an_entry_says_what_it_is_and_what_it_takes() -> None:
    for name, entry in OPTIMIZERS.items():
        assert entry.name == name
        assert entry.title
        assert entry.summary
        assert entry.takes_categories or entry.takes_numbers
        assert not entry.categorical_name or OPTIMIZERS[entry.categorical_name].takes_categories


def test_a_genome_that_an_optimizer_does_not_take_is_refused() -> None:
    choices = OptimizerSettings(sigma=1.0, categories=(2, 2))
    for entry in OPTIMIZERS.values():
        if not entry.takes_categories:
            with pytest.raises(ValueError, match="continuous genes alone"):
                entry.make([0.0, 0.0], choices)
        if not entry.takes_numbers:
            with pytest.raises(ValueError, match="needs categorical genes"):
                entry.make([0.0, 0.0], OptimizerSettings(sigma=1.0))
            with pytest.raises(ValueError, match=r"needs categorical genes; .* use cma or random"):
                optimizer_for(entry.name, categorical=False)
        assert optimizer_for(entry.name, categorical=True).takes_categories
    assert optimizer_for("cma", categorical=True) is OPTIMIZERS["cat_cma"], "by its name in old search files"
    assert optimizer_for("cma", categorical=False) is OPTIMIZERS["cma"]


def test_a_diagonal_is_learnt_below_twenty_evaluations_per_gene_unless_the_user_chose() -> None:
    assert is_diagonal(None, 119, 6)
    assert not is_diagonal(None, 120, 6)
    assert is_diagonal(True, 10_000, 1)
    assert not is_diagonal(False, 1, 100)
