"""A search that asks each generation before the last results of the one before: the same rows whoever
finishes first, wherever
it is broken off, and no worker that waits for a straggler."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge import _yaml
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.evaluation import Standing, ranks
from evomerge.optimizers import Optimizer
from evomerge.optimizers.cat_cma import CatCma
from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.elitist import Elitist
from evomerge.optimizers.random_search import RandomSearch
from evomerge.search.dispatch import Budget
from evomerge.search.racing import Race
from evomerge.store import Store
from evomerge.workers import Job
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import SPACE, Crew, Killed, pipelined, plan, run, shuffled, sometimes


def standing(trial: Any) -> Standing | None:
    """What ranks a trial, by the plan's objective."""
    return (
        None
        if trial.score is None
        else Standing(
            math.inf, -trial.violation, trial.score, plan().objective.tie_break_score(trial.metrics)
        )
    )


@pytest.mark.parametrize("islands", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_whoever_finishes_first_the_rows_are_those_of_one_worker(
    islands: int, seed: int, tmp_path: Path
) -> None:
    of = pipelined(islands)
    run(tmp_path / "one" / "study.db", of, ToyPool(sometimes))
    num_workers = Crew(5, shuffled(seed), sometimes)
    run(tmp_path / "many" / "study.db", of, num_workers)
    assert num_workers.ended != num_workers.begun, "they overtook one another"
    assert stored_rows(tmp_path / "many" / "study.db") == stored_rows(tmp_path / "one" / "study.db")


@pytest.mark.parametrize("islands", [1, 2])
def test_killed_anywhere_it_is_the_same_search(islands: int, tmp_path: Path) -> None:
    of = pipelined(islands)
    run(tmp_path / "one" / "study.db", of, ToyPool())
    rows = stored_rows(tmp_path / "one" / "study.db")
    total = len(rows["evaluations"])
    for k in range(1, total + 1, 7):
        file = tmp_path / str(k) / "study.db"

        def kill(made: int, k: int = k) -> None:
            if made == k:
                raise Killed

        first, second = Crew(4, shuffled(k), after=kill), Crew(4, shuffled(k + 1))
        with pytest.raises(Killed):
            run(file, of, first)
        run(file, of, second)
        assert stored_rows(file) == rows, f"killed after {k} of {total}"
        assert not set(second.begun) & set(first.ended), "nothing acknowledged is begun again"


def test_no_worker_waits_for_a_straggler_and_the_generation_after_next_does(tmp_path: Path) -> None:
    """The first candidate of generation 2 comes only when nothing else can: by then all of generation 3 is
    there, and none of 4."""
    late: list[Job] = []
    ended: list[list[int]] = []
    of = pipelined()

    def last(flying: list[Job]) -> int:
        if not late and flying[-1].turn == 1:
            late.append(flying[-1])
        open_to = [i for i, job in enumerate(flying) if not late or job.slot != late[0].slot]
        if late and not open_to and len(ended) == 0:
            ended.append([flying[0].turn])
        return open_to[0] if open_to else 0

    num_workers = Crew(3, last)
    run(tmp_path / "study.db", of, num_workers)
    assert ended == [[1]], "it was waited for, alone"
    with Store.open(tmp_path / "study.db") as store:
        trials = [t for t in store.trials() if t.generation and t.origin != "mean"]
    of_recipe = {t.recipe_id: t.generation for t in trials}
    order = [of_recipe.get(recipe, 0) for recipe, items in num_workers.ended if "'s" in items]
    place = num_workers.ended.index((late[0].recipe.id, str(late[0].items)))
    before = [g for g in order[: place + 1] if g]
    assert sorted(before) == [1] * 6 + [2] * 6 + [3] * 6, (
        "all of two generations, and none of the one that needs its rank"
    )


def test_each_generation_learns_from_those_before_the_last(tmp_path: Path) -> None:
    """Written as a loop: the genomes in the store are those of an optimizer that is told with a delay of
    one."""
    of = pipelined()
    run(tmp_path / "study.db", of, Crew(4, shuffled(0)))
    with Store.open(tmp_path / "study.db") as store:
        trials = [t for t in store.trials() if t.generation and t.origin != "mean"]
        parents = [t for t in store.trials() if t.generation == 0 and t.score is not None]
        encoded = [(t, g) for t in parents if (g := SPACE.encode(store.recipe(t.recipe_id))) is not None]
    stored = [[t for t in trials if t.generation == g] for g in range(1, 7)]
    best = sorted(encoded, key=lambda pair: (-float(pair[0].score or 0), pair[0].id))[:3]
    es = CmaEs(SPACE.start, 0.15, population=6, seed=5)
    es.inject([g for _, g in best])
    asked = [es.ask(), es.ask()]
    for number in range(6):
        assert np.array_equal(asked[number], np.array([t.genome for t in stored[number]])), (
            f"generation {number + 1}"
        )
        es.tell(asked[number], ranks([standing(t) for t in stored[number]]))
        if len(asked) < 6:
            asked.append(es.ask())
    undelayed = CmaEs(SPACE.start, 0.15, population=6, seed=5)
    undelayed.inject([g for _, g in best])
    undelayed.tell(undelayed.ask(), ranks([standing(t) for t in stored[0]]))
    assert not np.array_equal(undelayed.ask(), asked[1]), "or there is nothing to see here"


class Stuck:
    """Asks for the same genomes for ever."""

    mu = 3

    def __init__(self) -> None:
        self._genomes = CmaEs(SPACE.start, 0.15, population=6, seed=5).ask()
        self.mean = self._genomes[0]

    def ask(self) -> Any:
        return self._genomes

    def inject(self, genomes: Any) -> None:
        pass

    def tell(self, genomes: Any, scores: list[float | None]) -> list[int]:
        return [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_what_two_generations_in_flight_ask_for_is_evaluated_once(seed: int, tmp_path: Path) -> None:
    of = pipelined(
        evaluations=18, make=lambda start, island: Stuck(), per_generation=30
    )  # all items, each time the same
    num_workers = Crew(5, shuffled(seed))
    run(tmp_path / "many" / "study.db", of, num_workers)
    assert len(num_workers.begun) == len(set(num_workers.begun))
    run(tmp_path / "one" / "study.db", of, ToyPool())
    rows = stored_rows(tmp_path / "many" / "study.db")
    assert rows == stored_rows(tmp_path / "one" / "study.db")
    assert len({t["recipe"] for t in rows["trials"] if t["generation"]}) <= 7
    assert len([t for t in rows["trials"] if t["origin"] == "sampled" or t["origin"] == "injected"]) == 18


def test_a_budget_that_is_used_up_ends_it_after_what_was_asked_and_a_larger_one_goes_on(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a" / "study.db"
    outcome = run(file, pipelined(), Crew(3, shuffled(0), seconds=1800.0), budget=Budget(gpu_hours=4.0))
    assert outcome.generations == 2, "two generations were asked when the budget was found to be used up"
    again = Crew(3, shuffled(1), seconds=1800.0)
    assert run(file, pipelined(), again, budget=Budget(gpu_hours=4.0)) == outcome
    assert again.begun == [], "a replay ends where the first run did"
    run(file, pipelined(), Crew(3, shuffled(2), seconds=1800.0), budget=Budget(gpu_hours=4000.0))
    run(tmp_path / "one" / "study.db", pipelined(), ToyPool())

    def searched(file: Path) -> list[Any]:
        with Store.open(file) as store:
            return [
                (t.generation, t.slot, t.recipe_id, t.score) for t in store.trials() if t.origin != "mean"
            ]

    assert searched(file) == searched(tmp_path / "one" / "study.db")


COUNTS = (4, 2, 3, 5)
MAKE: dict[str, Callable[[], Optimizer]] = {
    "cma": lambda: CmaEs([0.0] * 6, 0.3, population=8, seed=2),
    "cma of one gene": lambda: CmaEs([0.0], 0.3, population=8, seed=2),
    "catcma": lambda: CatCma([0.0] * 7, 1.0, categories=COUNTS, keep_probability=0.7, population=8, seed=2),
    "elitist": lambda: Elitist(
        [0.0] * 7, 1.0, categories=COUNTS, keep_probability=0.7, population=18, seed=2
    ),
    "random": lambda: RandomSearch(
        [0.0] * 7, 1.0, categories=COUNTS, keep_probability=0.7, population=8, seed=2
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_every_optimizer_takes_two_asks_ahead_and_its_tells_in_their_order(name: str) -> None:
    def value(genome: np.ndarray) -> float:
        return -float(np.sum((genome - 0.5) ** 2))

    def delayed(optimizer: Optimizer, generations: int) -> list[np.ndarray]:
        asked = [optimizer.ask(), optimizer.ask()]
        for number in range(generations):
            optimizer.tell(asked[number], [value(g) for g in asked[number]])
            if len(asked) < generations:
                asked.append(optimizer.ask())
        return asked

    one, other = delayed(MAKE[name](), 12), delayed(MAKE[name](), 12)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    best = [max(value(g) for g in genomes) for genomes in one]
    if name != "random":
        assert np.mean(best[-3:]) > np.mean(best[:2]), "it learns"
    optimizer = MAKE[name]()
    first, second = optimizer.ask(), optimizer.ask()
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="oldest ask"):
        optimizer.tell(second, [value(g) for g in second])
    optimizer.tell(first, [value(g) for g in first])
    with pytest.raises(ValueError, match="oldest ask"):
        optimizer.tell(first, [value(g) for g in first])
    optimizer.tell(second, [value(g) for g in second])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["diagonal", "full", "catcma"])
def test_told_a_generation_late_a_distribution_converges(name: str, seed: int) -> None:
    """Points told as they stood made each move of the mean again, and longer: 40 genes came to NaN. The delay
    costs a quarter or so."""
    size, loss = 40, np.logspace(0, 2, 40)
    make: dict[str, Callable[[], Optimizer]] = {
        "diagonal": lambda: CmaEs([0.0] * size, 0.15, population=16, diagonal=True, seed=seed),
        "full": lambda: CmaEs([0.0] * size, 0.15, population=16, seed=seed),
        "catcma": lambda: CatCma(
            [0.0] * (4 + size), 0.15, categories=[3] * 4, keep_probability=0.9, population=16, seed=seed
        ),
    }

    def value(genome: np.ndarray) -> float:
        return -float(np.sum(loss * (genome[-size:] - 0.5) ** 2)) - float(
            len(genome) > size and genome[0] != 0
        )

    def generations(ahead: int) -> int:
        optimizer, count = make[name](), 0
        asked, worst = [optimizer.ask() for _ in range(1 + ahead)], value(optimizer.mean)
        while value(optimizer.mean) < worst / 100 and count < 1000:
            genomes = asked.pop(0)
            optimizer.tell(genomes, [value(g) for g in genomes])
            asked.append(optimizer.ask())
            count += 1
        return count

    assert generations(1) < 2 * generations(0) < 2000


def test_a_race_and_a_pipelined_search_are_not_had_together() -> None:
    text = (
        "study: s\nmodels: {a: {path: m}, b: {path: m}}\nbase: a\nmethod: linear\ntasks: [{task: "
        "sorting}]\nsearch: {race: {}, pipelined: true}\n"
    )
    with pytest.raises(ConfigError, match=r"^search\.yaml:6:\d+ a search is raced or pipelined, not both"):
        loading.check(_yaml.parse(text, "search.yaml"))
    assert loading.check(_yaml.parse(text.replace("race: {}, ", ""), "search.yaml")).search.pipelined
    with pytest.raises(ConfigError, match="not both"):
        pipelined(race=Race((0.5, 1.0), 0.05))
