"""Where a search stands: counts, the best that never falls, pace and time left, updates for listeners."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.evaluation import Objective, Term
from evomerge.evaluation.estimates import objective_estimate, paired
from evomerge.reports.monitor import Monitor, Update
from evomerge.reports.tally import Limits, Tally, limits_of, study_figures
from evomerge.search import Progress
from evomerge.store import Store, StudyFacts, Trial, score_check
from tests.support.stored import add_many, attempt
from tests.support.toy import ToyPool
from tests.support.toy_search import plan, search

OBJECTIVE = Objective((Term("first"), Term("second", 2.0)))


def trial(number: int, reported: float | None, **changes: object) -> Trial:
    given = {
        "id": number,
        "generation": 1,
        "slot": number,
        "origin": "sampled",
        "label": None,
        "genome": None,
        "parents": (),
        "recipe_id": f"r{number}",
        "score": reported,
        "error": None if reported is not None else "it is broken",
        "metrics": {},
        "seconds": {},
        "reported": reported,
    }
    return Trial(**(given | changes))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty study; trials are added to tallies alone."""
    folder = tmp_path / "trial"
    folder.mkdir()
    with Store.open(folder / "study.db", write=True) as opened:
        limits = {"budgets": [100], "price": 2.0, "gpus": 0.5, "gpu_hours": 8.0, "newer": 1}
        facts = StudyFacts(budgets=(40,), limits=limits, scoring={"device": "cuda:0"})
        opened.begin("trial", 3, "study: trial\n", {}, facts)
        yield opened  # type: ignore[misc]


def test_the_best_that_is_shown_never_falls(store: Store) -> None:
    """It was the best of the generation: each generation without a new best made the bar's number fall."""
    tally, generator = Tally(store, Limits(), None), random.Random(0)
    shown = []
    for number in range(1, 200):
        reported = generator.random() if generator.random() < 0.9 else None
        soft = None if reported is None else generator.random()  # what the search ranks by
        dropped = 1 if generator.random() < 0.1 else None
        tally.add(trial(number, reported, score=soft, dropped=dropped, generation=number // 8), 0.0)
        best = tally.figures().best
        shown.append(-1.0 if best is None else best.score)
    assert shown == sorted(shown)
    assert len(set(shown)) > 3


def test_a_candidate_that_breaks_keep_is_best_only_while_no_other_is_there(store: Store) -> None:
    tally = Tally(store, Limits(), None)
    assert tally.add(trial(1, 0.9, violation=0.2), 0.0)
    assert tally.add(trial(2, 0.4), 0.0)
    assert not tally.add(trial(3, 0.8, violation=0.1), 0.0)
    assert not tally.add(trial(2, 0.95), 0.0), "a known trial changes nothing"
    best = tally.figures().best
    assert best is not None
    assert (best.id, best.violation) == (2, 0.0)


def test_pace_and_time_left_come_from_the_last_generations(store: Store) -> None:
    tally = Tally(store, Limits(budgets=(100,)), None)
    for number in range(1, 11):
        tally.add(trial(number, 0.1, generation=0, origin="hand"), 1000.0)
    assert tally.figures().rate is None
    number, time = 10, 1000.0
    for generation in range(1, 9):
        pause = 50_000.0 if generation == 5 else 0.0  # between two runs
        for slot in range(10):
            number, time = number + 1, time + 2.0 + (pause if slot == 0 else 0.0)
            tally.add(trial(number, 0.1, generation=generation, slot=slot), time)
    figures = tally.figures()
    assert figures.evaluations == 80
    assert figures.rate == pytest.approx(1800.0)
    assert figures.eta == pytest.approx(20 * 2.0)
    assert figures.budget == 100


def test_limits_are_those_of_the_last_run(store: Store) -> None:
    study = store.study()
    assert study is not None
    limits = limits_of(study.facts)
    assert limits == Limits(budgets=(100,), price=2.0, gpus=0.5, gpu_hours=8.0)
    assert limits_of(StudyFacts(budgets=(40,))) == Limits(budgets=(40,))
    store.activity.add_attempts([attempt(seconds=7200.0)])
    figures = study_figures(store)
    assert (figures.gpu_hours, figures.cost, figures.on_gpu) == (1.0, 2.0, True)


def test_limits_may_differ_between_start_and_resume() -> None:
    before = StudyFacts(limits={"budgets": [10]})
    assert before.differences(StudyFacts(limits={"budgets": [20]})) == []
    assert StudyFacts.from_json(before.to_json()) == before


def test_a_tally_of_a_running_search_is_that_of_its_store(tmp_path: Path) -> None:
    """What a monitor adds up trial by trial, and what `status` reads of the file, are the same."""
    kinds: list[str] = []
    figures = []
    monitors: list[Monitor] = []

    class Listening:
        def update(self, update: Update) -> None:
            kinds.append(update.kind)
            figures.append(update.figures)

    def seen(study, progress) -> None:  # type: ignore[no-untyped-def]
        if not monitors:
            monitors.append(Monitor(study.store, [Listening()]))
        monitors[0].show(progress)

    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool(), plan(), seen)
    with Store.open(file) as stored:
        now = study_figures(stored)
        trials = stored.trials()
    monitors[0].tally.store = Store.open(file)
    last = figures[-1]
    assert (last.evaluations, last.failed, last.generation) == (now.evaluations, now.failed, now.generation)
    assert last.best is not None
    assert now.best is not None
    assert (last.best.id, last.best.score) == (now.best.id, now.best.score)
    assert now.evaluations == sum(t.origin in ("sampled", "injected") for t in trials) == 18
    assert kinds.count("generation") == 3
    assert kinds.count("candidate") + kinds.count("best") == len(trials)


def test_the_error_and_the_lead_are_those_of_the_items(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool(), plan())
    with Store.open(file, write=True) as stored:
        study = stored.study()
        assert study is not None
        assert study_figures(stored).lead_error is None, "an older study did not store its objective"
        term = {"sign": 1, "mean": True, "measures": [], "leaves": []}
        facts = {"first": term, "second": term}
        objective = score_check.objective_facts(OBJECTIVE)
        more = StudyFacts.from_json({**study.facts.to_json(), "terms": facts, "objective": objective})
        stored.set_config(study.name, study.config, {}, more)
        figures = study_figures(stored)
        best, parent = figures.best, figures.parent
        assert best is not None
        assert parent is not None
        for standing in (best, parent):
            scored = stored.scored(stored.trial(standing.id))
            expected = objective_estimate(OBJECTIVE, scored.evaluation, scored.reported)
            assert expected is not None
            assert standing.error == expected.error
        assert figures.lead == pytest.approx(best.score - parent.score)
        items = [stored.scored(stored.trial(one.id)).evaluation.items for one in (best, parent)]
        assert {i.item for i in items[0]} == {i.item for i in items[1]}, "of one generation's items"
        assert figures.lead_error == paired(*items, OBJECTIVE.shares()).error


def test_a_listener_that_raises_costs_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def update(self, update: Update) -> None:
            raise RuntimeError("hf_abcdefghijklmnopqrstuvwxyz is refused")

    class Counting:
        seen = 0

        def update(self, update: Update) -> None:
            self.seen += 1

    counting = Counting()
    monitor = Monitor(store, [Broken(), counting])
    add_many(store, 3)
    with caplog.at_level(logging.WARNING):
        for stored in store.trials():
            monitor.show(Progress("search", 1, 3, trial=replace(stored, id=stored.id + 100)))
    assert counting.seen == 3
    assert len(caplog.records) == 1
    assert "Broken is left out" in caplog.text
    assert "hf_" not in caplog.text
