"""What is said once a search is over: estimates across generations, finalists, tests, intervals, luck, skills
kept, fronts."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evomerge import reports
from evomerge.cli import study_tables
from evomerge.errors import ConfigError, FailureBudget
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Term
from evomerge.evaluation.estimates import Estimate, paired, stratified
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Study, selection
from evomerge.spaces import Baseline
from evomerge.store import NewTrial, Outcome, Scored, Store, StudyFacts, Trial
from tests.support.landscape import height, uniform
from tests.support.toy import ToyPool, stored_rows, weight_space
from tests.support.toy_search import POOLS, REFERENCES, SoftPool, broken, plan, search

MEAN = Objective((Term("first"), Term("second", 2.0)))
SPACE = weight_space()


def scores(key: object, p: Mapping[str, float], n: int = 40) -> tuple[ItemScore, ...]:
    """Items that are right with a task's probability."""
    return tuple(
        ItemScore(task, f"t{i}", float(uniform(key, task, i) < q)) for task, q in p.items() for i in range(n)
    )


def scored(items: Sequence[ItemScore], objective: Objective = MEAN, name: str = "r") -> Scored:
    metrics = {
        task: float(np.mean([s.value for s in items if s.task == task]))
        for task in dict.fromkeys(s.task for s in items)
    }
    return Scored(objective(metrics), Evaluation(name, tuple(items), metrics, {}), objective(metrics))


def recipe_at(generation: int, slot: int) -> Recipe:
    """Another recipe for each place."""
    return SPACE.decode([(16 * generation + slot) / 500 - 0.3] * len(SPACE.axes))


def trial(number: int, **changes: Any) -> Trial:
    given: dict[str, Any] = {
        "id": number,
        "generation": 9,
        "slot": number,
        "origin": "sampled",
        "label": None,
        "genome": (),
        "parents": (),
        "recipe_id": f"r{number}",
        "score": 0.5,
        "error": None,
        "metrics": {},
        "seconds": {},
        "reported": 0.5,
    }
    return Trial(**(given | changes))


# ---- estimates over the search pool ------------------------------------------------------------------------


class Landscape:
    """Candidates of rising skill on items of their own difficulty, window after window, through a real
    store."""

    size, pool, per = 40, 160, 6  # items of a generation, of the search, candidates of a generation

    def __init__(self, file: Path, generations: int, seed: int) -> None:
        self.items: Items = {"first": tuple(f"i{k}" for k in range(self.pool))}
        self.seed, self.generations = seed, generations
        self.objective = Objective((Term("first"),))
        self.study = Study(
            plan(
                items=dict.fromkeys(POOLS, self.items),
                per_generation=self.size,
                objective=self.objective,
                seed=seed,
            ),
            None,
            None,  # type: ignore[arg-type]
        )
        self.store = Store.open(file, write=True)
        self.truth: dict[int, float] = {}
        for generation, slot in itertools.product(range(1, generations + 1), range(self.per)):
            items, recipe = self.study.runner.windows.items(generation), recipe_at(generation, slot)
            values = {i: self.value(generation, slot, i) for i in self.items["first"]}
            own = tuple(ItemScore("first", i, values[i]) for i in items["first"])
            metrics = {"first": float(np.mean([s.value for s in own]))}
            t = self.store.add_trial(
                NewTrial(
                    generation=generation,
                    slot=slot,
                    origin="sampled",
                    label=None,
                    genome=(),
                    parents=(),
                    recipe=recipe,
                    items=items,
                    evaluation=Evaluation(recipe.id, own, metrics, {}),
                    score=metrics["first"],
                )
            )
            self.truth[t.id] = float(np.mean(list(values.values())))

    def value(self, generation: int, slot: int, item: str) -> float:
        """Difficulty weighs most, skill rises with the generation."""
        ease = -1.5 if uniform(self.seed, "ease", item) < 0.5 else 1.5
        skill = 0.15 * generation + 0.5 * uniform(self.seed, "skill", generation, slot)
        return float(uniform(self.seed, generation, slot, item) < 1 / (1 + math.exp(-1.5 * ease - skill + 1)))

    def estimates(self) -> dict[int, Estimate]:
        trials = self.store.trials()
        return selection.estimates(
            self.store,
            self.objective,
            self.items,
            trials,
            self.generations,
            lambda t: self.study.runner.windows.epochs(t, self.generations),
        )


def test_estimates_are_nearer_the_truth_than_scores_and_know_how_near(tmp_path: Path) -> None:
    """12 generations, three times through the items: less than .8 of the raw error, no bias by generation,
    and 95 % intervals."""
    raw, corrected, inside, early, late = [], [], [], [], []
    for seed in range(4):
        land = Landscape(tmp_path / f"{seed}.db", 12, seed)
        found = land.estimates()
        with land.store:
            for t in land.store.trials():
                low, high = found[t.id].interval()
                inside.append(low <= land.truth[t.id] <= high)
                raw.append((t.score or 0.0) - land.truth[t.id])
                corrected.append(found[t.id].mean - land.truth[t.id])
                (early if t.generation <= 6 else late).append(corrected[-1])
    assert np.mean(np.square(corrected)) < 0.8**2 * np.mean(np.square(raw))
    assert abs(np.mean(corrected)) < 0.015
    assert abs(np.mean(late) - np.mean(early)) < 0.02, "the skill of those beside it is not taken for its own"
    assert 0.9 < np.mean(inside) < 0.99


def test_in_a_first_epoch_the_estimate_is_the_plain_mean_with_its_plain_error(tmp_path: Path) -> None:
    land = Landscape(tmp_path / "study.db", 3, 1)
    found = land.estimates()
    with land.store:
        for t in land.store.trials():
            plain = stratified(land.store.scored(t).evaluation.items, {"first": 1.0})
            assert found[t.id].mean == pytest.approx(plain.mean, abs=1e-14)
            assert found[t.id].error == pytest.approx(plain.error * math.sqrt(1 - 40 / 160), abs=1e-14)


def test_there_is_no_estimate_of_what_is_no_mean(tmp_path: Path) -> None:
    land = Landscape(tmp_path / "study.db", 1, 1)
    with land.store:
        for objective in (Objective((Term("first"),), "worst"), Objective((Term("first", mean=False),))):
            assert (
                selection.estimates(
                    land.store, objective, land.items, land.store.trials(), 1, lambda t: {"first": 0}
                )
                == {}
            )


def test_leaders_keep_first_then_by_estimate_one_a_recipe() -> None:
    trials = [
        trial(1, score=0.9),
        trial(2, score=0.8),
        trial(3, score=0.7, recipe_id="r2"),
        trial(4, score=0.95, violation=0.1),
        trial(5, dropped=2),
        trial(6, generation=4),
        trial(7, origin="mean"),
        trial(8, generation=11),
        trial(9, score=None),
        trial(10, score=0.6, origin="injected"),
    ]
    assert [t.id for t in selection.leaders(trials, {}, 5, 10)] == [1, 2, 10, 4]
    known = {i: Estimate(m, 0.1, 9) for i, m in ((1, 0.5), (2, 0.6), (3, 0.9), (4, 0.99), (10, 0.55))}
    assert [t.id for t in selection.leaders(trials, known, 5, 10)] == [3, 10, 1, 4]


# ---- tests, intervals, luck --------------------------------------------------------------------------------


def test_p_values_are_holms_over_the_paired_tests() -> None:
    names = {f"r{i}": {"first": 0.7 - 0.014 * i * i, "second": 0.6 - 0.006 * i * i} for i in range(6)}
    validated = {name: scored(scores(name, p, 200), name=name) for name, p in names.items()}
    found = selection.p_values(MEAN, "r0", ["r3", "r0", "r1", "r2", "r3", "r4", "gone", "r5"], validated)
    assert set(found) == {"r1", "r2", "r3", "r4", "r5"}
    raw = {
        n: paired(
            validated["r0"].evaluation.items, validated[n].evaluation.items, {"first": 1.0, "second": 2.0}
        ).p_value()
        for n in found
    }
    order, largest = sorted(raw, key=lambda n: raw[n]), 0.0
    for rank, name in enumerate(order):
        largest = max(largest, min(1.0, (5 - rank) * raw[name]))
        assert found[name] == pytest.approx(largest, abs=1e-15)
    assert found["r5"] < 0.05 < found["r1"], "one clear difference, one that is none"
    assert (
        selection.p_values(Objective((Term("first"), Term("second")), "worst"), "r0", ["r1"], validated) == {}
    )


@pytest.mark.parametrize("kind", ["mean", "geometric", "worst"])
def test_the_headline_error_is_the_jackknifes(kind: Any) -> None:
    """Delta method against leaving out one item after the other."""
    objective = Objective(
        (Term("first"), Term("second", 2.0), Term("third", 0.5, -1 if kind == "mean" else 1)), kind
    )
    items = scores("j", {"first": 0.8, "second": 0.5, "third": 0.9}, 60)
    found = selection.headline(objective, scored(items, objective))
    assert found is not None
    assert found.mean == scored(items, objective).reported
    variance = 0.0
    for task in ("first", "second", "third"):
        own = [s for s in items if s.task == task]
        left = [scored([s for s in items if s != out], objective).reported or 0.0 for out in own]
        variance += (len(own) - 1) / len(own) * float(np.sum((np.array(left) - np.mean(left)) ** 2))
    assert found.error == pytest.approx(math.sqrt(variance), rel=0.02)
    low, high = selection.interval(found, objective, scored(items, objective))["test_interval"]
    assert low < found.mean < high


def test_no_error_is_claimed_where_none_is_known() -> None:
    items = scores("x", {"first": 0.5, "second": 0.5})
    assert selection.headline(Objective((Term("first", mean=False), Term("second"))), scored(items)) is None
    assert (
        selection.headline(
            Objective((Term("first"), Term("second")), "geometric"),
            Scored(0.0, scored(scores("x", {"first": 0.0, "second": 0.5})).evaluation, 0.0),
        )
        is None
    )
    assert selection.headline(MEAN, Scored(None, Evaluation("r", (), {}, {}, "it failed"), None)) is None
    known = scored(items)
    assert selection.interval(None, MEAN, known) == selection.lead(None, MEAN, known, known) == {}
    assert selection.selection_bias_columns(None, None) == {}


def test_luck_is_the_difference_of_independent_estimates() -> None:
    one, other = (selection.headline(MEAN, scored(scores(k, {"first": 0.6, "second": 0.5}))) for k in "ab")
    assert one is not None
    assert other is not None
    found = selection.selection_bias_columns(one, other)
    assert found["luck"] == pytest.approx(one.mean - other.mean, abs=1e-15)
    assert found["luck_error"] == pytest.approx(math.hypot(one.error, other.error), abs=1e-15)


# ---- skills kept -------------------------------------------------------------------------------------------


def test_retention_is_paired_by_task_and_alarms_beyond_its_error() -> None:
    objective = Objective(
        (
            Term("first"),
            Term("group", subtasks=(("second", 0.25), ("third", 0.75))),
            Term("loss", 1.0, -1),
            Term("f1", mean=False),
        )
    )
    means = {"first": 0.5, "second": 0.8, "third": 0.8, "loss": 0.5, "f1": 0.5}
    winner = scored(scores("w", means, 100), objective)
    parents = [
        ("math", scored(scores("m", means | {"first": 0.8}, 100), objective)),
        ("chat", scored(scores("c", means | {"loss": 0.1, "third": 0.4}, 100), objective)),
    ]
    rows = selection.retention(objective, winner, parents)
    assert [(r["task"], r["parent"]) for r in rows] == [
        (t, p) for t in ("first", "group", "loss") for p in ("math", "chat")
    ]
    for row in rows:
        parent = dict(parents)[row["parent"]]
        term = next(t for t in objective.terms if t.task == row["task"])
        mean = variance = 0.0
        for leaf, share in term.strata:
            a, b = ({s.item: s.value for s in x.evaluation.items if s.task == leaf} for x in (winner, parent))
            d = np.array([term.sign * (a[i] - b[i]) for i in a])
            mean += share * d.mean()
            variance += share**2 * d.var(ddof=1) / len(d)
        assert row["difference"] == pytest.approx(mean, abs=1e-12)
        assert row["error"] == pytest.approx(math.sqrt(variance), abs=1e-12)
        assert row["lost"] == (row["difference"] < -1.96 * row["error"])
    assert {(r["task"], r["parent"]) for r in rows if r["lost"]} == {("first", "math"), ("loss", "chat")}
    said = reports.lost_skills(rows)
    assert said.startswith("LOST: ")
    assert "task first -0." in said
    assert "against math" in said
    assert "group" not in said
    assert reports.lost_skills([r for r in rows if not r["lost"]]) == "no skill lost"
    assert reports.lost_skills([]) == ""


def test_a_failed_parent_is_no_skill_lost() -> None:
    failed = Scored(None, Evaluation("r", (), {}, {}, "it failed"), None)
    assert (
        selection.retention(MEAN, scored(scores("w", {"first": 0.5, "second": 0.5})), [("math", failed)])
        == []
    )


# ---- the outcome of a study --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A finished search by soft scores, with ties broken by them and facts for its report."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    file.parent.mkdir()
    with Store.open(file, write=True) as store:
        store.begin(
            "trial",
            5,
            "",
            {},
            StudyFacts.from_json({"tasks": {"first": "", "second": ""}, "versions": {"evomerge": "0"}}),
        )
        return file, Study(plan(objective=SOFT), store, SoftPool()).run()


SOFT = Objective(
    (Term("first", search=(("metric", 0.5), ("probability", 0.5))), Term("second", 2.0)),
    tie_break="probability",
)


def test_the_outcome_reports_metrics_with_errors(whole: tuple[Path, Outcome]) -> None:
    file, outcome = whole
    best = outcome.best
    with Store.open(file) as store:
        tested = dict(store.evaluations(best["recipe"]))["test"]
        assert best["test"] == pytest.approx(
            (tested.evaluation.metrics["first"] + 2 * tested.evaluation.metrics["second"]) / 3, abs=1e-14
        )
        plain = stratified(tested.evaluation.items, {"first": 1.0, "second": 2.0})
        assert best["test_error"] == pytest.approx(plain.error, abs=1e-14)
        below, above = [], []
        for task, share in (("first", 1 / 3), ("second", 2 / 3)):
            own_values = [s.value for s in tested.evaluation.items if s.task == task]
            wilson = stats.binomtest(int(sum(own_values)), len(own_values)).proportion_ci(method="wilson")
            below.append(share * (np.mean(own_values) - wilson.low))
            above.append(share * (wilson.high - np.mean(own_values)))
        wanted = [best["test"] - np.hypot(*below), best["test"] + np.hypot(*above)]
        assert best["test_interval"] == pytest.approx(wanted, abs=1e-9)
        own = store.trial(best["id"])
        assert (
            best["search"]
            == own.reported
            == pytest.approx((own.metrics["first"] + 2 * own.metrics["second"]) / 3, abs=1e-14)
        )
        assert best["luck"] == pytest.approx(best["search"] - best["test"], abs=1e-14)
        seen = (
            0.5 * own.metrics["first"] + 0.5 * own.metrics["first:probability"] + 2 * own.metrics["second"]
        ) / 3
        assert own.score == pytest.approx(seen, abs=1e-14)
        for row in [*outcome.references, *outcome.finalists]:
            assert 0 <= row["p"] <= 1 if row["recipe"] != best["recipe"] else "p" not in row
            mean, error = outcome.estimates[row["id"]]
            assert (row["estimate"], row["estimate_error"]) == (mean, error)
        assert [r["parent"] for r in outcome.retention if r["task"] == "first"] == ["base", "a"]
        assert all(
            row["lead_interval"][0] <= row["lead"] <= row["lead_interval"][1] for row in outcome.references
        )


def test_report_and_screens_say_it(whole: tuple[Path, Outcome]) -> None:
    file, outcome = whole
    with Store.open(file) as store:
        text, data = reports.study_markdown(store), reports.study_summary(store)
        low, high = outcome.best["test_interval"]
        assert f"{outcome.best['test']:.3f} on test (95 % {low:.3f} to {high:.3f})" in text.splitlines()[0]
        assert "against the best parent" in text.splitlines()[0]
        for heading in ("## Finalists", "## Skills kept", "## Trade-offs", "## The search"):
            assert f"\n{heading}\n" in text
        assert f"{outcome.best['luck']:+.3f} ± {outcome.best['luck_error']:.3f} above its test score" in text
        shown = study_tables.study_table(data)
        assert f"95 % interval: {low:.3f} to {high:.3f}; search - test {outcome.best['luck']:+.3f}" in shown
        assert "retention: " in shown
        found = reports.candidate(store, store.trial(outcome.best["id"]))
        assert f"estimate over all search items: {found['estimate'][0]:.3f} ±" in study_tables.candidate_text(
            found
        )
        assert "first probability" in study_tables.candidate_text(found)


def test_ties_change_ranks_and_never_a_score(tmp_path: Path) -> None:
    """Items so few that hard scores tie: the order told to the optimizer follows the soft score, the stored
    score does not."""
    told: list[list[float | None]] = []

    class Watched(CmaEs):
        """Keeps what it is told."""

        def tell(self, genomes: Any, scores: list[float | None]) -> list[int]:
            told.append(scores)
            return super().tell(genomes, scores)

    broken_ties = Objective((Term("first"), Term("second", 2.0)), tie_break="logprob")
    few = plan(
        objective=broken_ties, per_generation=3, optimizer=lambda s: Watched(s, 0.15, population=6, seed=5)
    )
    search(tmp_path / "trial" / "study.db", SoftPool(), few)
    ties = 0
    with Store.open(tmp_path / "trial" / "study.db") as store:
        for generation, ranked in enumerate(told, start=1):
            own = [t for t in store.trials() if t.generation == generation and t.origin != "mean"]
            for (a, x), (b, y) in itertools.permutations(zip(own, ranked, strict=True), 2):
                assert a.score == a.reported == broken_ties(a.metrics)
                if a.score == b.score and a.recipe_id != b.recipe_id and x is not None and y is not None:
                    ties += 1
                    assert (x > y) == (
                        broken_ties.tie_break_score(a.metrics) > broken_ties.tie_break_score(b.metrics)
                    )
                elif (
                    a.score is not None
                    and b.score is not None
                    and x is not None
                    and y is not None
                    and a.score > b.score
                ):
                    assert x > y
    assert ties >= 4, "or nothing was tested"


def test_soft_scores_that_nobody_gives_end_the_search_at_its_first_candidate(tmp_path: Path) -> None:
    pool = ToyPool()
    with pytest.raises(ConfigError, match="task 'first' gives no probability"):
        search(tmp_path / "trial" / "study.db", pool, plan(objective=SOFT))
    assert len(pool.calls) == 1
    with Store.open(tmp_path / "trial" / "study.db") as store:
        assert store.study().state == "failed"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["geometric", "worst"])
def test_other_kinds_search_and_report_too(kind: Any, tmp_path: Path) -> None:
    outcome = search(tmp_path / "trial" / "study.db", ToyPool(), plan(objective=Objective(MEAN.terms, kind)))
    assert outcome.best["validation"] == max(
        r["validation"] for r in [*outcome.finalists, *outcome.references]
    )
    assert outcome.estimates == {}
    assert not any("p" in row or "lead" in row for row in outcome.references)
    assert outcome.best["test_interval"][0] < outcome.best["test"] < outcome.best["test_interval"][1]


# ---- constraints -------------------------------------------------------------------------------------------


class Skewed(ToyPool):
    """The second task gets worse where the first gets better; parent 'a' is good at the second."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        label = next((b.label for b in REFERENCES if b.recipe.id == recipe.id), None)
        h = height(recipe)
        p = {"first": h, "second": 0.9 if label == "a" else 0.8 - 0.5 * h}
        own = tuple(
            ItemScore(t, i, float(uniform(recipe.id, t, i) < p[t])) for t, ids in items.items() for i in ids
        )
        metrics = {t: math.fsum(s.value for s in own if s.task == t) / len(ids) for t, ids in items.items()}
        return Evaluation(recipe.id, own, metrics, {"score": 0.0})


KEEP = Objective((Term("first", 3.0), Term("second")), keep=(("second", 0.3),))


def test_candidates_that_break_a_floor_rank_after_all_that_keep_it(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    pool, of = Skewed(), plan(objective=KEEP, evaluations=24)
    outcome = search(file, pool, of)
    study = Study(of, None, None)  # type: ignore[arg-type]
    with Store.open(file) as store:
        parents = {t.label: t for t in store.trials() if t.origin == "parent"}
        full = {t.label: store.evaluation(t.recipe_id, "search", POOLS["search"]) for t in parents.values()}
        whole = {
            label: {s.item: s.value for s in found.evaluation.items if s.task == "second"}
            for label, found in full.items()
            if found
        }
        assert set(whole) == {"base", "a"}, "the parents have been scored on all search items, once"
        best = max(whole, key=lambda label: sum(whole[label].values()))
        assert best == "a"
        broke = 0
        for t in store.trials():
            ids = study.runner.windows.items(t.generation + (t.origin == "mean"))["second"]
            floor = sum(whole[best][i] for i in ids) / len(ids) - 0.3
            assert t.violation == pytest.approx(max(0.0, floor - t.metrics["second"]), abs=1e-12)
            broke += t.violation > 0
        assert broke >= 5
        for generation in (1, 2, 3):
            own = sorted(
                (t for t in store.trials() if t.generation == generation and t.origin != "mean"),
                key=lambda t: (t.violation, -(t.score or 0.0), t.slot),
            )
            assert {
                t.parents for t in store.trials() if t.generation == generation + 1 and t.origin == "sampled"
            } == {tuple(t.id for t in own[:3])}
        floor = (
            dict(store.evaluations(parents["a"].recipe_id))["validation"].evaluation.metrics["second"] - 0.3
        )
        standing = [*outcome.finalists, *outcome.references]
        keeping = [r for r in standing if r["validation_metrics"]["second"] >= floor]
        assert keeping
        assert outcome.best["validation"] == max(r["validation"] for r in keeping)
        assert max(r["validation"] for r in standing) > outcome.best["validation"], (
            "or the floor asks for nothing"
        )
        worst = max(store.trials(), key=lambda t: t.violation)
        assert "breaks the search's keep by" in study_tables.candidate_text(reports.candidate(store, worst))


@pytest.mark.parametrize("how", ["stop", "kill", "lost"])
def test_a_search_with_floors_is_taken_up_as_it_was(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.search.test_study.ToyPool", Skewed)
    of = plan(objective=KEEP)
    broken(tmp_path / "whole" / "study.db", [], how, of)
    rows = stored_rows(tmp_path / "whole" / "study.db")
    for k in (1, 2, 3, 11, 25, 34):
        broken(tmp_path / f"{k}" / "study.db", [k], how, of)
        assert stored_rows(tmp_path / f"{k}" / "study.db") == rows


def test_floors_need_a_parent(tmp_path: Path) -> None:
    parents = {b.recipe.id for b in REFERENCES if b.origin == "parent"}
    with pytest.raises(FailureBudget, match="'keep' has nothing to compare with: recipe"):
        search(tmp_path / "trial" / "study.db", ToyPool(lambda r: r.id in parents), plan(objective=KEEP))
    one = next(b for b in REFERENCES if b.label == "a")
    outcome = search(
        tmp_path / "other" / "study.db", ToyPool(lambda r: r.id == one.recipe.id), plan(objective=KEEP)
    )
    assert outcome.best["test"] is not None


# ---- items of a task's own number --------------------------------------------------------------------------


def test_tasks_may_have_numbers_of_their_own() -> None:
    study = Study(plan(per_generation={"first": 5, "second": 11}), None, None)  # type: ignore[arg-type]
    assert [len(ids) for ids in study.runner.windows.items(3).values()] == [5, 11]
    both = Study(plan(per_generation=5), None, None)  # type: ignore[arg-type]
    assert study.runner.windows.items(4)["first"] == both.runner.windows.items(4)["first"], (
        "a task's windows are its own"
    )


# ---- the front ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_front_is_what_nobody_dominates_in_any_order(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    points = [tuple(rng.randrange(4) / 4 for _ in range(3)) for _ in range(14)]
    wanted = {
        i
        for i, p in enumerate(points)
        if not any(q != p and all(x >= y for x, y in zip(q, p, strict=True)) for q in points)
    }
    sets: list[Items] = [{"first": ("a",)}, {"first": ("b",)}]
    with Store.open(tmp_path / "study.db", write=True) as store:
        store.begin("trial", 0, "", {}, StudyFacts.from_json({"tasks": {}}))
        assert store.front("search") == []
        order = rng.sample(range(14), 14)
        for generation, items in enumerate(sets, start=1):
            for slot in order:
                recipe = recipe_at(generation, slot)
                store.add_trial(
                    NewTrial(
                        generation=generation,
                        slot=slot,
                        origin="sampled",
                        label=None,
                        genome=(),
                        parents=(),
                        recipe=recipe,
                        items=items,
                        evaluation=Evaluation(recipe.id, (ItemScore("first", "a", 0.5),), {}, {}),
                        score=0.5,
                        task_values=points[slot],
                    )
                )
        assert {t.slot for t in store.front("search")} == wanted
        assert {t.generation for t in store.front("search")} == {2}, "of the newest items alone"
        assert reports.front(store)["items"] == "generation 2"
        assert len(stored_rows(tmp_path / "study.db")["front"]) == 2 * len(wanted), (
            "what is dominated is not kept"
        )


def test_the_front_of_a_finished_search_is_over_validation(whole: tuple[Path, Outcome]) -> None:
    file, outcome = whole
    rows = {
        r["recipe"]: (r["validation_metrics"]["first"], r["validation_metrics"]["second"])
        for r in [*outcome.finalists, *outcome.references]
    }
    wanted = {
        r for r, p in rows.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in rows.values())
    }
    with Store.open(file) as store:
        found = reports.front(store)
        assert found["items"] == "validation"
        assert {c["recipe"] for c in found["candidates"]} == wanted
        assert {store.trial(i).recipe_id for i in reports.study_summary(store)["pareto"]} == wanted
        for c in found["candidates"]:
            assert (c["metrics"]["first"], c["metrics"]["second"]) == rows[c["recipe"]]
        assert (
            f"{file.parent.name}/pareto" in study_tables.study_table(reports.study_summary(store))
            or len(wanted) == 1
        )


def test_a_hand_recipe_that_wins_is_called_by_its_name(tmp_path: Path) -> None:
    best: Baseline = max(REFERENCES, key=lambda b: height(b.recipe))
    file = tmp_path / "trial" / "study.db"
    file.parent.mkdir()

    class Hand(ToyPool):
        """One hand recipe is always right."""

        def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
            right = 1.0 if recipe.id == best.recipe.id else 0.4
            own = tuple(
                ItemScore(t, i, float(uniform(recipe.id, t, i) < right))
                for t, ids in items.items()
                for i in ids
            )
            metrics = {
                t: math.fsum(s.value for s in own if s.task == t) / len(ids) for t, ids in items.items()
            }
            return Evaluation(recipe.id, own, metrics, {})

    with Store.open(file, write=True) as store:
        store.begin(
            "trial", 5, "", {}, StudyFacts.from_json({"tasks": {"first": "", "second": ""}, "versions": {}})
        )
        outcome = Study(plan(), store, Hand()).run()
        assert outcome.best["recipe"] == best.recipe.id
        assert f"the hand recipe '{best.label}'" in reports.study_markdown(store).splitlines()[0]
