"""Races in a study: what is scored, stored and ranked; broken off anywhere and taken up, it is the race that
nobody broke off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge import reports
from evomerge.errors import ConfigError
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Role, Term
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import racing
from evomerge.search.racing import Race
from evomerge.store import NewTrial, Outcome, Store, Trial
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import POOLS, REFERENCES, SPACE, SoftPool, broken, own, plan, search

RUNGS = (0.25, 0.5, 0.75, 1.0)
LARGE: dict[Role, Items] = {
    "search": {task: tuple(f"s{i}" for i in range(120)) for task in ("first", "second")},
    "validation": POOLS["validation"],
    "test": POOLS["test"],
}


def raced(**changes: Any) -> Any:
    """A plan whose generations are raced, on enough items for races to end early."""
    given: dict[str, Any] = {
        "race": Race(RUNGS, 0.2),
        "items": LARGE,
        "per_generation": 60,
        "evaluations": 24,
        "optimizer": lambda start: CmaEs(start, 0.3, population=12, seed=5),
    }
    return plan(**(given | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ToyPool, Outcome]:
    """(file, pool, outcome) of a raced search that nothing interrupted."""
    file = tmp_path_factory.mktemp("raced") / "trial" / "study.db"
    pool = ToyPool()
    return file, pool, search(file, pool, raced())


def searched(store: Store) -> list[Trial]:
    return [t for t in store.trials() if t.generation > 0 and t.origin != "mean"]


# ---- what a race does --------------------------------------------------------------------------------------


def test_a_race_scores_less_and_says_of_whom(whole: tuple[Path, ToyPool, Outcome]) -> None:
    file, pool, _ = whole
    asked = sum(len(ids) for _, items in pool.calls for ids in items.values() if ids[0][0] == "s")
    with Store.open(file) as store:
        trials = searched(store)
        dropped, partial = [t for t in trials if t.dropped], [t for t in trials if t.whole is not None]
        assert len(dropped) >= 6, "or the tests below see nothing"
        assert {t.id for t in dropped} <= {t.id for t in partial}
        assert asked < 0.9 * 120 * (len(REFERENCES) + len(trials) + 1)
        for t in partial:
            found = reports.candidate(store, t)
            count = len(store.scored(t).evaluation.items)
            assert found["partial"] == f"{count} of 120 items"
            assert count < 120
        data = reports.study_summary(store)
        assert (data["dropped"], data["partial"]) == (len(dropped), len(partial))
        assert data["evaluations"] == 24
        assert not {t.id for t in partial} & {t.id for t in store.front("search")}, (
            "a front compares what was scored on the same items"
        )


def test_a_trials_items_are_the_first_of_its_generations(whole: tuple[Path, ToyPool, Outcome]) -> None:
    """Nested rungs: prefixes of the common subset, and metrics that are their means."""
    file, pool, _ = whole
    from evomerge.search import Study

    subset = Study(raced(), None, None).runner.windows.items  # type: ignore[arg-type]
    with Store.open(file) as store:
        for t in searched(store):
            items = store.scored(t).evaluation.items
            for task, ids in subset(t.generation).items():
                mine = [s.item for s in items if s.task == task]
                assert mine == list(ids[: len(mine)])
                values = [s.value for s in items if s.task == task]
                assert t.metrics[task] == pytest.approx(sum(values) / len(values), abs=1e-15)
            fresh = {s: pool.evaluate(store.recipe(t.recipe_id), {s.task: (s.item,)}).items[0] for s in items}
            assert all(s == f for s, f in fresh.items()), "what is stored is what the pool said"
            if t.whole is None:
                assert t.score == pytest.approx((t.metrics["first"] + 2 * t.metrics["second"]) / 3, abs=1e-15)


def test_nothing_is_scored_twice(whole: tuple[Path, ToyPool, Outcome]) -> None:
    _, pool, _ = whole
    asked = [
        (recipe, task, item) for recipe, items in pool.calls for task, ids in items.items() for item in ids
    ]
    seen: set[tuple[str, str, str]] = set()
    again = [key for key in asked if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    assert not again, "hand recipes that are injected bring their scores along"


def test_the_dropped_rank_below_all_others(whole: tuple[Path, ToyPool, Outcome]) -> None:
    """Parents of the next generation are the best by how far they came, then by score."""
    file, _, _ = whole
    with Store.open(file) as store:
        first = [t for t in searched(store) if t.generation == 1]
        ranked = sorted(first, key=lambda t: (-(t.dropped or math.inf), -(t.score or 0.0), t.slot))
        mu = CmaEs([0.0] * len(SPACE.axes), 0.3, population=12, seed=5).mu
        parents = {t.parents for t in searched(store) if t.generation == 2 and t.origin == "sampled"}
        assert parents == {tuple(t.id for t in ranked[:mu])}
        assert all(t.dropped is None for t in ranked[:mu])
        leader = max((t for t in first if t.dropped is None), key=lambda t: t.score or 0.0)
        assert any(t.score is not None and t.dropped and t.score > 0 for t in first)
        assert leader.dropped is None


def test_a_race_that_is_never_sure_is_the_search_without_it(tmp_path: Path) -> None:
    """At an error rate of almost nothing nobody is settled before the end, and every score is that of all
    items."""
    kept = ("generation", "slot", "genome", "recipe")
    search(tmp_path / "raced" / "study.db", ToyPool(), raced(race=Race(RUNGS, 1e-300)))
    search(tmp_path / "plain" / "study.db", ToyPool(), raced(race=None))
    one, other = (stored_rows(tmp_path / name / "study.db") for name in ("raced", "plain"))
    scores = [
        {e["id"]: (e["score"], e["metrics"], e["scores"]) for e in rows["evaluations"]}
        for rows in (one, other)
    ]
    a, b = (
        [(*(t[k] for k in kept), own[t["evaluation"]]) for t in rows["trials"]]
        for rows, own in zip((one, other), scores, strict=True)
    )
    assert a == b
    assert {t["whole"] for t in one["trials"]} == {None}


def test_failures_are_out_of_the_race(tmp_path: Path) -> None:
    pool = ToyPool(lambda recipe: own(recipe) and uniform("x", recipe.id) < 0.4)
    search(tmp_path / "trial" / "study.db", pool, raced())
    with Store.open(tmp_path / "trial" / "study.db") as store:
        failed = [t for t in searched(store) if t.error]
        assert len(failed) >= 3
        for t in failed:
            assert (t.score, t.dropped, t.whole) == (None, None, None)
            assert t.recipe_id in str(t.error)
        assert (
            store.count_evaluations()["failed"]
            == reports.study_summary(store)["failed"]
            == len({t.recipe_id for t in store.trials() if t.error})
        )


def test_a_race_by_soft_scores(tmp_path: Path) -> None:
    """The race sees what the search sees; what is reported are metrics."""
    soft = Objective((Term("first", search=(("probability", 1.0),)), Term("second", 2.0)))
    search(tmp_path / "trial" / "study.db", SoftPool(), raced(objective=soft))
    with Store.open(tmp_path / "trial" / "study.db") as store:
        assert any(t.dropped for t in searched(store))
        for t in searched(store):
            assert t.reported == pytest.approx((t.metrics["first"] + 2 * t.metrics["second"]) / 3, abs=1e-14)
            if t.whole is None:
                assert t.score == pytest.approx(
                    (t.metrics["first:probability"] + 2 * t.metrics["second"]) / 3, abs=1e-14
                )


# ---- broken off and taken up -------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "stride"), [("stop", 9), ("kill", 11), ("lost", 13)])
def test_broken_off_anywhere_it_is_the_same_race(
    how: str, stride: int, whole: tuple[Path, ToyPool, Outcome], tmp_path: Path
) -> None:
    rows, calls = stored_rows(whole[0]), len(whole[1].calls)
    for k in range(len(REFERENCES) + 1, calls + 1, stride):
        file = tmp_path / f"{k}" / "study.db"
        pools = broken(file, [k], how, raced())
        assert stored_rows(file) == rows, f"broken off after {k} of {calls}"
        assert sum(len(p.calls) for p in pools) == calls + (how == "lost"), (
            "nothing acknowledged is scored again"
        )


def test_broken_off_while_its_trials_are_written_it_is_the_same_race(
    whole: tuple[Path, ToyPool, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between two rows of a generation that has been raced to its end."""
    rows = stored_rows(whole[0])
    for k in (len(REFERENCES) + 1, len(REFERENCES) + 7, len(REFERENCES) + 13):
        file, count, add = tmp_path / f"{k}" / "study.db", [0], Store.add_trial

        def counted(
            self: Store, new: NewTrial, count: list[int] = count, k: int = k, add: Any = add
        ) -> Trial:
            count[0] += 1
            if count[0] == k:
                raise KeyboardInterrupt
            trial: Trial = add(self, new)
            return trial

        with monkeypatch.context() as patch:
            patch.setattr(Store, "add_trial", counted)
            with pytest.raises(KeyboardInterrupt):
                search(file, ToyPool(), raced())
        assert len(stored_rows(file)["trials"]) == k - 1
        search(file, ToyPool(), raced())
        assert stored_rows(file) == rows


def test_a_larger_budget_goes_on_where_the_smaller_ended(
    whole: tuple[Path, ToyPool, Outcome], tmp_path: Path
) -> None:
    search(tmp_path / "large" / "study.db", ToyPool(), raced(evaluations=36))
    search(tmp_path / "grown" / "study.db", ToyPool(), raced())
    search(tmp_path / "grown" / "study.db", ToyPool(), raced(evaluations=36))
    kept = ("generation", "slot", "genome", "recipe", "dropped", "whole")
    large, grown = (
        [
            tuple(t[k] for k in kept)
            for t in stored_rows(tmp_path / n / "study.db")["trials"]
            if t["origin"] != "mean"
        ]
        for n in ("large", "grown")
    )
    assert large == grown


# ---- the race by itself ------------------------------------------------------------------------------------


def table(seed: int, count: int, items: Items) -> dict[tuple[str, str, str], float]:
    """0/1 scores of candidates with skills of their own on items of different ease; keys: recipe, task,
    item."""
    recipes = [recipe.id for recipe in candidates(count).values()]
    return {
        (r, task, i): float(
            uniform(seed, r, task, i)
            < 1 / (1 + math.exp(-2.5 * (uniform(seed, "s", r) - uniform(seed, "d", task, i))))
        )
        for r in recipes
        for task, ids in items.items()
        for i in ids
    }


def candidates(count: int) -> dict[int, Recipe]:
    return {slot: SPACE.decode([slot / 20] * len(SPACE.axes)) for slot in range(count)}


def scorer(scores: Mapping[tuple[str, str, str], float]) -> racing.Score:
    """Scores by a table."""

    def score(recipes: Sequence[Recipe], items: Items) -> dict[str, Evaluation]:
        return {
            r.id: Evaluation(
                r.id,
                tuple(ItemScore(task, i, scores[r.id, task, i]) for task, ids in items.items() for i in ids),
                {},
                {"score": 1.0},
            )
            for r in recipes
        }

    return score


def test_a_race_keeps_the_best_as_often_as_it_says() -> None:
    """40 generations at an error of .2: 8 may lose one of their best; more than 15 has a probability below .5
    %."""
    items = {"one": tuple(map(str, range(60))), "two": tuple(map(str, range(40)))}
    objective, wrong, used = Objective((Term("one", 2.0), Term("two"))), 0, 0
    for seed in range(40):
        scores = table(seed, 12, items)
        found = racing.run(candidates(12), items, Race(RUNGS, 0.2), objective, 6, scorer(scores))
        full = {
            s: objective(
                {t: math.fsum(scores[r.id, t, i] for i in ids) / len(ids) for t, ids in items.items()}
            )
            for s, r in candidates(12).items()
        }
        mine = sorted(found, key=lambda s: (-(found[s].dropped or math.inf), -_seen(found[s], objective)))[:6]
        best = sorted(full.values(), reverse=True)[:6]
        wrong += sorted((full[s] for s in mine), reverse=True) != pytest.approx(
            best, abs=1e-12
        )  # equals are as good as each other
        used += sum(len(ids) for r in found.values() for ids in r.items.values())
    assert wrong <= 15
    assert used < 40 * 12 * 100


def _seen(fate: racing.RaceResult, objective: Objective) -> float:
    return objective.search_score(fate.evaluation.metrics) if fate.predicted is None else fate.predicted


def test_rungs_add_up_to_all_items_and_seconds_to_their_sum() -> None:
    items = {"one": tuple(map(str, range(7))), "two": ("a", "b", "c")}
    found = racing.run(
        candidates(2),
        items,
        Race(RUNGS, 0.2),
        Objective((Term("one"), Term("two"))),
        2,
        scorer(table(1, 2, items)),
    )
    for fate in found.values():
        assert set(fate.items) == set(items)
        assert 0 < fate.evaluation.seconds["score"] <= len(RUNGS)
    full = racing.run(
        candidates(3),
        items,
        Race((1.0,)),
        Objective((Term("one"), Term("two"))),
        1,
        scorer(table(1, 3, items)),
    )
    assert all(f.items == items and f.dropped is None and f.predicted is None for f in full.values())


def test_groups_have_their_metric_of_the_leaves_means() -> None:
    scores = [
        ItemScore("b", "1", 1.0),
        ItemScore("b", "2", 0.0),
        ItemScore("c", "1", 1.0, 0.25, -1.0),
        ItemScore("c", "2", 1.0, 0.75, None),
    ]
    found = racing.means(scores, Objective((Term("g", subtasks=(("b", 0.25), ("c", 0.75))),)))
    assert found == {"b": 0.5, "c": 1.0, "c:probability": 0.5, "c:logprob": -1.0, "g": 0.25 * 0.5 + 0.75}


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (Objective((Term("first"), Term("second")), "worst"), "'worst'"),
        (Objective((Term("first"), Term("second")), "geometric"), "'geometric'"),
        (Objective((Term("first"), Term("second", mean=False))), "task 'second' is aggregated otherwise"),
        (Objective((Term("first"), Term("second")), keep=(("first", 0.1),)), "'keep'"),
    ],
)
def test_what_cannot_be_raced_is_refused(objective: Objective, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        raced(objective=objective)
    assert plan(objective=objective).race is None
