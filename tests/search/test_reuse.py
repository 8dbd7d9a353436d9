"""What an earlier study scored is not scored again, and a search that reuses it is, row by row, the one that
did not."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import loading
from evomerge.errors import Paused, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Term
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Plan, Study
from evomerge.search.racing import Race
from evomerge.search.reuse import REUSED, Earlier, KnownPool
from evomerge.store import NewEvaluation, Store, StudyFacts
from evomerge.workers import Job, Pool
from tests.support.toy import ToyPool, results, search_file, stored_rows
from tests.support.toy_search import POOLS, REFERENCES, plan

STORED_FACTS: dict[str, Any] = {
    "parents": {
        name: {"path": name, "revision": None, "sha256": f"hash of {name}"} for name in ("base", "a", "b")
    },
    "tasks": {"first": "hash of first", "second": "hash of second"},
    "terms": {
        t: {"sign": 1, "mean": True, "measures": [], "leaves": [[t, 1.0]]} for t in ("first", "second")
    },
    "backends": {"first": "compiled", "second": "compiled"},
    "versions": {"torch": "2", "evomerge": "1"},
    "threads": 1,
    "gate": None,
    "scoring": {
        "base": "base",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 64,
        "backend": "resident",
        "tokenizer": "t",
    },
}
FACTS = StudyFacts.from_json(STORED_FACTS)
BASE, MERGED = (
    next(b.recipe for b in REFERENCES if b.label == label) for label in ("base", "task arithmetic 1")
)


def other(seed: int = 6) -> Plan:
    """A search that goes elsewhere from the same parents and hand recipes."""
    return plan(optimizer=lambda start: CmaEs(start, 0.3, population=6, seed=seed))


def search(
    file: Path, pool: Pool, of: Plan | None = None, facts: StudyFacts = FACTS, stop_after: int = 0
) -> None:
    """One process' life: begins a study or goes on with it. stop_after: results after which it is told to
    stop, 0 for none."""
    file.parent.mkdir(exist_ok=True)
    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin(file.parent.name, 5, "study: trial\n", {}, facts)
        study = Study(of or plan(), store, pool)
        shown = 0

        def show(progress: Any) -> None:
            nonlocal shown
            shown += 1
            if shown == stop_after:
                study.dispatch.request_stop()

        study.show = show
        study.run()


def rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    """A study's rows without what tells its name."""
    found = stored_rows(file)
    for row in found["study"]:
        row.pop("name")
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a finished study."""
    file = tmp_path_factory.mktemp("first") / "first" / "study.db"
    search(file, ToyPool())
    return file


def changed(change: Callable[[dict[str, Any]], None]) -> StudyFacts:
    """The facts with one changed."""
    stored = copy.deepcopy(STORED_FACTS)
    change(stored)
    return StudyFacts.from_json(stored)


# ---- whole searches ----------------------------------------------------------------------------------------


def test_the_same_search_again_evaluates_nothing(first: Path, tmp_path: Path) -> None:
    pool, file = ToyPool(), tmp_path / "again" / "study.db"
    known = KnownPool(pool, Earlier([first], FACTS))
    search(file, known)
    assert pool.calls == []
    assert rows(file) == rows(first)
    assert known.hits == len(rows(first)["evaluations"])
    with Store.open(file) as store:
        assert {tuple(t.seconds) for t in store.trials()} == {(REUSED,)}, "and says so"


@pytest.mark.parametrize("race", [None, Race((0.5, 1.0), 0.4)], ids=["whole", "raced"])
def test_another_search_reuses_what_is_known_and_its_rows_are_those_without(
    race: Race | None, first: Path, tmp_path: Path
) -> None:
    alone, beside = ToyPool(), ToyPool()
    of = (
        other()
        if race is None
        else plan(optimizer=lambda start: CmaEs(start, 0.3, population=6, seed=6), race=race)
    )
    search(tmp_path / "alone" / "study.db", alone, of)
    of = (
        other()
        if race is None
        else plan(optimizer=lambda start: CmaEs(start, 0.3, population=6, seed=6), race=race)
    )
    known = KnownPool(beside, Earlier([first], FACTS))
    search(tmp_path / "beside" / "study.db", known, of)
    assert rows(tmp_path / "beside" / "study.db") == rows(tmp_path / "alone" / "study.db")
    assert known.hits >= len(REFERENCES)
    assert len(beside.calls) == len(alone.calls) - known.hits
    assert beside.calls, "the rest is evaluated"


def test_several_studies_are_asked_in_turn(first: Path, tmp_path: Path) -> None:
    second = tmp_path / "second" / "study.db"
    search(second, ToyPool(), other())
    pool = ToyPool()
    known = KnownPool(pool, Earlier([first, second], FACTS))
    search(tmp_path / "third" / "study.db", known, other())
    assert pool.calls == []
    assert rows(tmp_path / "third" / "study.db") == rows(second)


def test_a_search_broken_off_goes_on_without_what_it_reused(first: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole" / "study.db", tmp_path / "broken" / "study.db"
    search(whole, ToyPool(), other())
    with pytest.raises(Paused):
        search(broken, KnownPool(ToyPool(), Earlier([first], FACTS)), other(), stop_after=12)
    search(broken, ToyPool(), other())
    assert rows(broken) == rows(whole)


def test_a_search_over_models_reads_what_it_would_have_scored(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real models and tasks, through the configuration: nothing is scored, and every row is the same to the
    bit."""
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    before = finished / "small" / "study.db"
    settings, text = loading.load(str(search_file(tmp_path, "again", evaluations=8)))
    study = prepare_study(
        SearchRequest(settings.model_copy(update={"reuse": (str(before),)}), text), tmp_path
    )
    with study.store, contextlib.closing(study.pool):
        study.run()
        assert isinstance(study.pool, KnownPool)
        assert study.pool.earlier.refused == []
        assert study.pool.attempts() == []
        assert study.pool.hits == len(rows(before)["evaluations"])
    ours, theirs = rows(tmp_path / "again" / "study.db"), rows(before)
    for row in (*ours["study"], *theirs["study"]):
        row.pop("config")  # it names the study
        row["facts"] = json.loads(row["facts"])
        row["facts"].pop("verifications", None)  # of a process that scored nothing, whatever it knew before
    assert ours == theirs


# ---- what makes an evaluation another one ------------------------------------------------------------------

POLICIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a version": (lambda f: f["versions"].update(torch="3"), "versions.torch was 2, is 3"),
    "threads": (lambda f: f.update(threads=2), "threads was 1, is 2"),
    "the gate": (lambda f: f.update(gate=3.5), "gate was None, is 3.5"),
    "the device": (lambda f: f["scoring"].update(device="cuda"), "scoring.device was cpu, is cuda"),
    "a card": (lambda f: f["scoring"].update(card="A100"), "scoring.card was None, is A100"),
    "the tokenizer": (lambda f: f["scoring"].update(tokenizer="u"), "scoring.tokenizer was t, is u"),
    "both tasks": (lambda f: f["tasks"].update(first="x", second="y"), "none of its tasks"),
}


@pytest.mark.parametrize("what", POLICIES)
def test_another_way_of_scoring_reuses_nothing_and_says_why(what: str, first: Path) -> None:
    change, why = POLICIES[what]
    with Earlier([first], changed(change)) as earlier:
        assert earlier.studies == ()
        assert len(earlier.refused) == 1
        assert why in earlier.refused[0]
        assert earlier.lookup(BASE, POOLS["test"]) is None


TASKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "hash": lambda f: f["tasks"].update(second="other"),
    "what answers it": lambda f: f["backends"].update(second="lm-eval: asked for"),
    "its soft scores": lambda f: f["terms"]["second"].update(measures=["probability"]),
    "a study without it": lambda f: [f[name].pop("second") for name in ("tasks", "terms")].clear(),
}


@pytest.mark.parametrize("what", TASKS)
def test_a_task_that_is_another_is_scored_again(what: str, first: Path) -> None:
    part = {"first": POOLS["validation"]["first"]}
    with Earlier([first], changed(TASKS[what]), parts=True) as earlier:
        assert earlier.studies == ("first",)
        assert earlier.lookup(BASE, POOLS["validation"]) is None
        assert earlier.lookup(BASE, part) is not None, "the other task is the same"


def test_another_parent_is_another_recipe_though_its_name_is_the_same(first: Path) -> None:
    facts = changed(lambda f: f["parents"]["a"].update(sha256="another"))
    with Earlier([first], facts) as earlier:
        assert earlier.lookup(BASE, POOLS["validation"]) is not None, "reads the base alone"
        assert "a" in MERGED.models
        assert earlier.lookup(MERGED, POOLS["validation"]) is None


def test_a_study_that_did_not_store_how_it_scored_is_not_asked(tmp_path: Path) -> None:
    file = tmp_path / "old" / "study.db"
    search(file, ToyPool(), facts=replace(FACTS, scoring={}))
    with Earlier([file], FACTS) as earlier:
        assert "did not store its scoring" in earlier.refused[0]
        assert earlier.lookup(BASE, POOLS["validation"]) is None


# ---- single evaluations ------------------------------------------------------------------------------------


def stored(
    tmp_path: Path, evaluations: list[tuple[Recipe, str, Items, Evaluation]], facts: StudyFacts = FACTS
) -> Path:
    file = tmp_path / "stored" / "study.db"
    file.parent.mkdir()
    with Store.open(file, write=True) as store:
        store.begin("stored", 5, "study: stored\n", {}, facts)
        for recipe, role, items, evaluation in evaluations:
            store.add_evaluation(NewEvaluation(recipe, role, items, evaluation, None))  # type: ignore[arg-type]
    return file


def test_failures_are_tried_again(tmp_path: Path) -> None:
    items = {"first": ("v0", "v1")}
    file = stored(
        tmp_path, [(BASE, "validation", items, Evaluation(BASE.id, (), {}, {}, error="a bad night"))]
    )
    with Earlier([file], FACTS, parts=True) as earlier:
        assert earlier.lookup(BASE, items) is None


def test_what_is_read_back_is_what_was_stored(tmp_path: Path) -> None:
    items = {"first": ("v1", "v0"), "second": ("v0",)}
    scores = (
        ItemScore("first", "v1", 0.1, 0.3, -1.1),
        ItemScore("first", "v0", 1 / 3, 0.7, -0.2),
        ItemScore("second", "v0", 0.0),
    )
    metrics = {
        "first": 0.21666666666666667,
        "first:probability": 0.5,
        "first:logprob": -0.65,
        "second": 0.0,
        "another group": 0.1,
    }
    given = Evaluation(
        BASE.id, scores, metrics, {"merge": 1.0, "score": 2.0}, costs={"layers": 5.0, "parameters": 100.0}
    )
    file = stored(tmp_path, [(BASE, "validation", items, given)])
    with Earlier([file], FACTS) as earlier:
        found = earlier.lookup(BASE, items)
        assert found is not None
        assert (found.items, found.costs, found.error) == (given.items, given.costs, None)
        assert found.metrics == {k: v for k, v in metrics.items() if k != "another group"}, (
            "this study has no such name"
        )
        assert earlier.lookup(BASE, {"first": ("v0", "v1"), "second": ("v0",)}) is None, (
            "in another order it is another set"
        )
        assert earlier.lookup(MERGED, items) is None


def test_items_are_put_together_only_where_that_is_asked(tmp_path: Path) -> None:
    toy = ToyPool()
    sets: list[Items] = [
        {"first": ("s0", "s1"), "second": ("s0",)},
        {"first": ("s2",), "second": ("s1", "s2")},
    ]
    file = stored(tmp_path, [(MERGED, "search", items, toy.evaluate(MERGED, items)) for items in sets])
    asked = {"first": ("s2", "s0"), "second": ("s2", "s0", "s1")}
    with Earlier([file], FACTS) as earlier:
        assert earlier.lookup(MERGED, asked) is None
    with Earlier([file], FACTS, parts=True) as earlier:
        found, whole = earlier.lookup(MERGED, asked), toy.evaluate(MERGED, asked)
        assert found is not None
        assert (found.items, found.metrics) == (whole.items, whole.metrics)
        assert earlier.lookup(MERGED, {"first": ("s0", "s3")}) is None, "one item is unknown"


@pytest.mark.parametrize(
    "said", [{"mean": False}, {"leaves": [["first", 0.5], ["third", 0.5]]}], ids=["no mean", "a group"]
)
def test_a_metric_that_is_no_mean_of_items_is_not_put_together(said: dict[str, Any], tmp_path: Path) -> None:
    facts = changed(lambda f: f["terms"]["first"].update(said))
    items = {"first": ("s0", "s1")}
    file = stored(tmp_path, [(MERGED, "search", items, ToyPool().evaluate(MERGED, items))], facts)
    with Earlier([file], facts, parts=True) as earlier:
        assert earlier.lookup(MERGED, items) is not None, "exactly these items were scored"
        assert earlier.lookup(MERGED, {"first": ("s0",)}) is None


# ---- faults ------------------------------------------------------------------------------------------------


def test_a_store_that_is_missing_is_an_error_at_the_start(first: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study"):
        Earlier([first, tmp_path / "none" / "study.db"], FACTS)


def test_a_store_damaged_while_it_is_asked_does_not_end_the_search(first: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged" / "study.db"
    file.parent.mkdir()
    file.write_bytes(first.read_bytes())
    with Earlier([file, first], FACTS) as earlier:
        noise = random.Random(1).randbytes(file.stat().st_size - 4096)
        with file.open("r+b") as handle:  # the first page, which says what the tables are, stays
            handle.seek(4096)
            handle.write(noise)
        assert earlier.lookup(MERGED, POOLS["validation"]) is not None, "the next study knows it too"
        assert earlier.studies == ("first",)


# ---- the pool ----------------------------------------------------------------------------------------------


def test_the_pool_counts_and_gives_each_job_once(first: Path) -> None:
    pool = ToyPool()
    known = KnownPool(pool, Earlier([first], FACTS))
    unknown = {"first": ("v0", "s1")}
    jobs = [Job(7, BASE, POOLS["validation"]), Job(3, BASE, unknown), Job(5, MERGED, POOLS["validation"])]
    found = results(known, jobs)
    assert [job.slot for job, _ in found] == [7, 3, 5]
    assert [(recipe, items) for recipe, items in pool.calls] == [(BASE.id, unknown)]
    assert (known.hits, known.out) == (2, 0)
    assert known.result(0.0) is None


def test_a_drained_pool_still_gives_what_is_known(first: Path) -> None:
    known = KnownPool(ToyPool(), Earlier([first], FACTS))
    known.submit([Job(0, BASE, {"first": ("v0", "s1")}), Job(1, BASE, POOLS["validation"])])
    assert known.out == 2
    known.drain()
    assert known.out == 1
    result = known.result()
    assert result is not None
    assert result[0].slot == 1
    assert known.out == 0
    known.close()


def test_the_objective_of_a_reused_study_is_its_own(first: Path, tmp_path: Path) -> None:
    """Evaluations are reused, not scores: other weights of the tasks give other scores of the same
    evaluations."""
    pool, of = ToyPool(), plan(objective=Objective((Term("first", 5.0), Term("second", 1.0))))
    search(tmp_path / "heavy" / "study.db", KnownPool(pool, Earlier([first], FACTS)), of)
    with Store.open(tmp_path / "heavy" / "study.db") as store, Store.open(first) as before:
        trial, same = store.trial(2), before.trial(2)
    assert trial.recipe_id == same.recipe_id
    assert trial.metrics == same.metrics
    assert trial.score == pytest.approx((5 * trial.metrics["first"] + trial.metrics["second"]) / 6)
