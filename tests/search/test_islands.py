"""Results that come in any order, several islands at one pool, a drained pool, budgets: the rows are those of
one worker in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import Paused
from evomerge.search import Plan, Study
from evomerge.search.dispatch import Budget, Dispatch
from evomerge.search.study import StageStart
from evomerge.store import Store, StudyFacts
from evomerge.workers import Job
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import Crew, Killed, islands, run, shuffled, sometimes


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_whoever_finishes_first_the_rows_are_those_of_one_worker(
    count: int, seed: int, tmp_path: Path
) -> None:
    of = islands(count)
    run(tmp_path / "one" / "study.db", of, ToyPool(sometimes))
    num_workers = Crew(5, shuffled(seed), sometimes)
    run(tmp_path / "many" / "study.db", of, num_workers)
    assert num_workers.ended != num_workers.begun, "they overtook one another"
    assert stored_rows(tmp_path / "many" / "study.db") == stored_rows(tmp_path / "one" / "study.db")


def test_islands_share_the_budget_and_differ(tmp_path: Path) -> None:
    outcome = run(tmp_path / "study.db", islands(3), ToyPool())
    with Store.open(tmp_path / "study.db") as store:
        trials = [t for t in store.trials() if t.generation and t.origin != "mean"]
        means = [t for t in store.trials() if t.origin == "mean"]
    assert len(trials) == 36
    assert {i: sorted({t.generation for t in trials if t.island == i}) for i in range(3)} == {
        0: [1, 4],
        1: [2, 5],
        2: [3, 6],
    }
    assert [t.id for t in trials] == list(range(trials[0].id, trials[0].id + 36)), (
        "ids follow generations and slots"
    )
    assert len({t.genome for t in trials if t.origin == "sampled"}) == len(
        [t for t in trials if t.origin == "sampled"]
    )
    assert len({t.recipe_id for t in means}) == 3
    assert {row["recipe"] for row in outcome.finalists} >= {t.recipe_id for t in means if t.score is not None}
    for t in trials:
        parents = [p for p in trials if p.id in t.parents and t.origin == "sampled"]
        assert {p.island for p in parents} <= {t.island}, "they do not mix"


def test_an_island_goes_on_while_another_waits_for_its_last_candidate(tmp_path: Path) -> None:
    """The first candidate of island 0's first generation comes only when nothing else is in flight."""
    held: list[int] = []

    def last(flying: list[Job]) -> int:
        held.append(held[0] if held else flying[0].slot)
        return next((i for i, job in enumerate(flying) if job.slot != held[0]), 0) if searching else 0

    searching = True
    num_workers = Crew(3, last)
    of = islands(2)
    seen: list[tuple[int, int]] = []
    with Store.open(tmp_path / "study.db", write=True) as store:
        store.begin("trial", 5, "", {}, StudyFacts())
        study = Study(of, store, num_workers)
        searching = False
        references = study._references()
        searching = True
        held.clear()
        study.show = lambda progress: (
            seen.append((len(seen), progress.done)) if progress.note.startswith("generation") else None
        )
        first = store.last_trial_before(1)
        assert first == len(references)
        opening = of.stages[0].open(None)  # type: ignore[arg-type]
        study._search(of.stages[0], opening, StageStart(0, references, (), 1))
        order = [t.generation for t in sorted(store.trials(), key=lambda t: t.id)]
    assert order == [0] * first + [g for g in range(1, 7) for _ in range(6)]
    assert [done for _, done in seen] == [6, 12, 18, 6, 12, 18], (
        "island 1 came to its end before island 0's first generation"
    )


@pytest.mark.parametrize("count", [1, 3])
def test_killed_anywhere_with_results_in_any_order_it_is_the_same_search(count: int, tmp_path: Path) -> None:
    of = islands(count)
    run(tmp_path / "one" / "study.db", of, ToyPool())
    rows = stored_rows(tmp_path / "one" / "study.db")
    total = len(rows["evaluations"])
    for k in range(1, total + 1, 9):
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


def test_a_stop_stores_what_is_in_flight_and_begins_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a" / "study.db"
    of = islands(2)
    pool: list[Crew] = []
    studies: list[Study] = []

    def stop(made: int) -> None:
        if made == 12:
            studies[0].dispatch.request_stop()
            flying.extend(job.recipe.id for job in pool[0].flying)

    flying: list[str] = []
    pool.append(Crew(4, shuffled(1), after=stop))
    file.parent.mkdir()
    with Store.open(file, write=True) as store:
        store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        studies.append(Study(of, store, pool[0]))
        with pytest.raises(Paused):
            studies[0].run()
        assert len(flying) == 4
        assert len(pool[0].begun) == len(pool[0].ended) == 16
        assert sum(store.count_evaluations()[role] for role in ("search",)) == len(set(pool[0].ended))
    again = Crew(4, shuffled(2))
    run(file, of, again)
    assert not set(again.begun) & set(pool[0].ended)
    run(tmp_path / "one" / "study.db", of, ToyPool())
    assert stored_rows(file) == stored_rows(tmp_path / "one" / "study.db")


def test_a_grace_that_is_over_drops_what_is_in_flight(tmp_path: Path) -> None:
    made: list[Dispatch] = []
    num_workers = Crew(4, shuffled(0), after=lambda ended: made[0].request_stop())
    with Store.open(tmp_path / "study.db", write=True) as store:
        store.begin("trial", 5, "", {}, StudyFacts())
        made.append(Dispatch(num_workers, store, grace=0.0))
        with pytest.raises(Paused):
            Study(islands(1), store, num_workers, dispatch=made[0]).run()
        assert store.count_evaluations()["search"] == len(num_workers.ended) == 1
    assert len(num_workers.flying) == 4


@pytest.mark.parametrize(
    ("budget", "said"),
    [(Budget(gpu_hours=4.0), "GPU hours"), (Budget(cost=8.0, price=1.0, gpus=2.0), "at 1")],
)
def test_a_budget_that_is_used_up_ends_the_search_with_its_test(
    budget: Budget, said: str, tmp_path: Path
) -> None:
    """Each attempt takes half an hour: 4 GPU hours are 8 of them, which the parents and hand recipes use
    up."""
    file = tmp_path / "a" / "study.db"
    outcome = run(file, islands(2), Crew(3, shuffled(0), seconds=1800.0), budget=budget)
    assert outcome.generations == 2, "one generation of each island"
    assert "test" in outcome.best
    with Store.open(file) as store:
        assert [(t.generation, t.slot) for t in store.trials() if t.generation and t.origin != "mean"] == [
            (g, s) for g in (1, 2) for s in range(6)
        ]
        assert set(store.activity.ends()) == {(0, 0), (0, 1)}
    rows = stored_rows(file)
    assert all(said in row["cause"] for row in rows["ends"])
    again = Crew(3, shuffled(1), seconds=1800.0)
    assert run(file, islands(2), again, budget=budget) == outcome
    assert again.begun == [], "a replay ends where the first run did"


def test_a_budget_made_larger_goes_on_along_the_same_search(tmp_path: Path) -> None:
    file = tmp_path / "a" / "study.db"
    run(file, islands(2), Crew(3, shuffled(0), seconds=1800.0), budget=Budget(gpu_hours=4.0))
    run(file, islands(2), Crew(3, shuffled(0), seconds=1800.0), budget=Budget(gpu_hours=4000.0))
    run(tmp_path / "one" / "study.db", islands(2), ToyPool())

    def searched(file: Path) -> list[Any]:
        with Store.open(file) as store:
            return [
                (t.generation, t.slot, t.recipe_id, t.score)
                for t in store.trials()
                if t.origin not in ("mean",)
            ]

    assert searched(file) == searched(tmp_path / "one" / "study.db")


def test_a_later_stage_is_left_out_where_nothing_is_left(tmp_path: Path) -> None:
    of = islands(1)
    both = Plan(
        **{f: getattr(of, f) for f in of.__dataclass_fields__} | {"stages": (of.stages[0], of.stages[0])}
    )
    outcome = run(
        tmp_path / "study.db", both, Crew(3, shuffled(0), seconds=3600.0), budget=Budget(gpu_hours=1.0)
    )
    assert [s.stage for s in outcome.stages] == ["weights"]
    assert outcome.best["test"] is not None
