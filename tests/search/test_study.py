"""The loop: a search broken off anywhere and taken up again is the search that was never broken off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge import reports
from evomerge.errors import FailureBudget, NothingToExport, Paused, StudyError
from evomerge.evaluation import Items, Objective, Term
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Plan, Progress, Study
from evomerge.search.dispatch import Budget, Dispatch
from evomerge.store import Outcome, Store, StudyFacts
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, stored_rows, weight_space
from tests.support.toy_search import (
    LABELS,
    POOLS,
    REFERENCES,
    SPACE,
    Killed,
    broken,
    own,
    plan,
    search,
    sometimes,
)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome]:
    """(rows, pool, outcome) of a search that nothing interrupted."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    pool = ToyPool()
    outcome = search(file, pool)
    return stored_rows(file), pool, outcome


# ---- a whole run -------------------------------------------------------------------------------------------


def test_a_whole_run_has_its_parts_in_order(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    rows, pool, outcome = whole
    trials, count = rows["trials"], len(REFERENCES)
    assert count == len(LABELS)
    assert [t["generation"] for t in trials] == [0] * count + [1] * 6 + [2] * 6 + [3] * 6 + [3]
    assert [t["origin"] for t in trials[:count]] == [b.origin for b in REFERENCES]
    assert [t["origin"] for t in trials[count : count + 6]] == ["injected"] * 3 + ["sampled"] * 3
    assert [t["origin"] for t in trials[count + 6 :]] == ["sampled"] * 12 + ["mean"]
    assert rows["study"][0]["state"] == "done"
    assert outcome.generations == 3
    assert len(outcome.references) == count
    assert len(pool.calls) == len(rows["evaluations"])


def test_the_winner_is_the_best_on_validation_of_all_that_stand(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    _, _, outcome = whole
    standing = [*outcome.finalists, *outcome.references]
    assert outcome.best["validation"] == max(row["validation"] for row in standing)
    hand = max(row["validation"] for row in outcome.references)
    assert outcome.best["validation"] >= hand
    assert "mean" in [row["origin"] for row in outcome.finalists]
    assert len(outcome.finalists) <= 3


def test_roles_are_used_in_order_and_whole(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    """No test item is looked at before the winner is chosen, no validation item before the search is over."""
    _, pool, outcome = whole
    roles = [next(iter(items.values()))[0][0] for _, items in pool.calls]
    assert roles == sorted(roles, key="svt".index)
    for recipe, items in pool.calls:
        letters = {item[0] for ids in items.values() for item in ids}
        assert len(letters) == 1
        if letters == {"v"}:
            assert items == POOLS["validation"]
        if letters == {"t"}:
            assert items == POOLS["test"]
            assert recipe in {outcome.best["recipe"]} | {r["recipe"] for r in outcome.references}


def test_no_recipe_is_scored_twice_on_the_same_items(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    _, pool, _ = whole
    asked = [(recipe, repr(items)) for recipe, items in pool.calls]
    assert len(set(asked)) == len(asked)


def test_the_scores_stored_are_the_pools(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome], tmp_path: Path
) -> None:
    pool, outcome = ToyPool(), whole[2]
    search(tmp_path / "trial" / "study.db", pool)
    with Store.open(tmp_path / "trial" / "study.db") as store:
        objective = plan().objective
        for recipe_id in {t.recipe_id for t in store.trials()}:
            for role, scored in store.evaluations(recipe_id):
                items: dict[str, list[str]] = {}
                for s in scored.evaluation.items:
                    items.setdefault(s.task, []).append(s.item)
                fresh = pool.evaluate(store.recipe(recipe_id), items)
                assert scored.evaluation == fresh, role
                metrics = fresh.metrics
                assert scored.score == pytest.approx(
                    (metrics["first"] + 2 * metrics["second"]) / 3, abs=1e-15
                )
                assert scored.score == objective(metrics)
        for row in outcome.references:
            found = dict(store.evaluations(row["recipe"]))
            assert (row["validation"], row["test"]) == (found["validation"].score, found["test"].score)


def test_sampled_candidates_name_those_recombined_into_them(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    rows, _, _ = whole
    scores = {e["id"]: e["score"] for e in rows["evaluations"]}
    by_generation = {
        g: list(ts) for g, ts in itertools.groupby(rows["trials"], key=lambda t: t["generation"])
    }
    for generation in (2, 3):
        before = sorted(by_generation[generation - 1], key=lambda t: (-scores[t["evaluation"]], t["slot"]))
        best = str([t["id"] for t in before[:3]])
        assert {t["parents"] for t in by_generation[generation] if t["origin"] == "sampled"} == {best}


# ---- windows of items --------------------------------------------------------------------------------------


def windows(of: Plan, generations: Iterable[int]) -> list[Items]:
    study = Study(of, None, None)  # type: ignore[arg-type]
    return [study.runner.windows.items(g) for g in generations]


def test_a_generation_is_scored_on_one_subset(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
) -> None:
    rows, _, _ = whole
    sets = {e["id"]: e["item_set"] for e in rows["evaluations"]}
    used = [
        {sets[t["evaluation"]] for t in rows["trials"] if t["generation"] == g and t["origin"] != "mean"}
        for g in range(4)
    ]
    assert [len(u) for u in used] == [1, 1, 1, 1]
    assert used[0] == used[1], "hand recipes and the first generation are comparable"
    assert len(set.union(*used[1:])) == 3
    mean = next(t for t in rows["trials"] if t["origin"] == "mean")
    assert sets[mean["evaluation"]] not in set.union(*used), "the mean is scored on items of its own"


@pytest.mark.parametrize("size", [1, 5, 6, 8, 11, 12, 24, 30, 100])
def test_windows_are_disjoint_within_an_epoch_and_cover_the_items(size: int) -> None:
    of = plan(per_generation=size)
    for task, ids in POOLS["search"].items():
        length = min(size, len(ids))
        per_epoch = len(ids) // length
        for epoch in range(3):
            generations = range(1 + epoch * per_epoch, 1 + (epoch + 1) * per_epoch)
            parts = [w[task] for w in windows(of, generations)]
            assert all(len(p) == length for p in parts)
            seen = list(itertools.chain(*parts))
            assert len(set(seen)) == len(seen) == per_epoch * length
            assert set(seen) <= set(ids)
            if len(ids) % length == 0:
                assert set(seen) == set(ids)
        assert {i for w in windows(of, range(1, 1 + 12 * per_epoch)) for i in w[task]} == set(ids), (
            "no item is left out for ever"
        )


def test_windows_depend_on_the_seed_and_nothing_else() -> None:
    first = windows(plan(), range(9))
    assert first == windows(plan(finalists=1, evaluations=999), range(9))
    assert first != windows(plan(seed=6), range(9))
    assert first[0] == first[1]
    epochs = [windows(plan(), range(1 + 3 * e, 4 + 3 * e)) for e in range(2)]
    assert epochs[0] != epochs[1], "a new epoch is a new shuffle"


# ---- broken off and taken up -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "kill", "lost"])
def test_broken_off_anywhere_and_taken_up_it_is_the_same_search(
    how: str, whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome], tmp_path: Path
) -> None:
    rows, pool, _ = whole
    calls = len(pool.calls)
    for k in range(1, calls + 1, 1 if how == "stop" else 5):
        file = tmp_path / f"{k}" / "study.db"
        pools = broken(file, [k], how)
        assert stored_rows(file) == rows, f"broken off after {k} of {calls}"
        assert sum(len(p.calls) for p in pools) == calls + (how == "lost"), (
            "nothing acknowledged is scored again"
        )


@pytest.mark.parametrize(("how", "step"), [("stop", 1), ("kill", 2), ("lost", 3), ("stop", 7)])
def test_broken_off_again_and_again_it_is_the_same_search(
    how: str,
    step: int,
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome],
    tmp_path: Path,
) -> None:
    rows, pool, _ = whole
    file = tmp_path / "trial" / "study.db"
    pools = broken(file, [step] * (len(pool.calls) // (step - (how == "lost")) + 1), how)
    assert stored_rows(file) == rows
    assert sum(len(p.calls) > 0 for p in pools) >= len(pool.calls) // step


@pytest.mark.parametrize("k", range(1, 40, 9))
def test_failures_are_part_of_what_is_taken_up(k: int, tmp_path: Path) -> None:
    broken(tmp_path / "whole" / "study.db", [], "stop", fails=sometimes)
    broken(tmp_path / "parts" / "study.db", [k, 3], "kill", fails=sometimes)
    rows = stored_rows(tmp_path / "whole" / "study.db")
    assert sum(e["error"] is not None for e in rows["evaluations"]) >= 3
    assert stored_rows(tmp_path / "parts" / "study.db") == rows


def test_a_stop_before_anything_is_a_pause(tmp_path: Path) -> None:
    pool = ToyPool()
    with Store.open(tmp_path / "study.db", write=True) as store:
        store.begin("trial", 5, "", {}, StudyFacts())
        study = Study(plan(), store, pool)
        study.dispatch.request_stop()
        with pytest.raises(Paused, match="--resume"):
            study.run()
        assert pool.calls == []
        assert store.count_trials() == 0


def test_equal_recipes_of_one_generation_share_an_evaluation(tmp_path: Path) -> None:
    """A coarse optimizer that asks for the same genome twice: broken off between the two, the rows are the
    same."""

    class Twice:
        """Asks for three genomes, two times each."""

        mean = CmaEs([0.0] * 12, 0.1).mean
        mu = 3

        def __init__(self) -> None:
            self._es = CmaEs([0.0] * len(SPACE.axes), 0.15, population=6, seed=5)
            self.mean = self._es.mean

        def ask(self) -> Any:
            self._asked = self._es.ask()
            return np.concatenate([self._asked[:3], self._asked[:3]])

        def inject(self, genomes: Any) -> None:
            pass

        def tell(self, genomes: Any, scores: list[float | None]) -> list[int]:
            assert scores[:3] == scores[3:]
            self._es.tell(self._asked, scores)
            return [0, 1, 2]

    of = plan(optimizer=lambda start: Twice())
    (pool,) = broken(tmp_path / "whole" / "study.db", [], "stop", of)
    rows = stored_rows(tmp_path / "whole" / "study.db")
    assert len(rows["trials"]) > len({t["recipe"] for t in rows["trials"]})
    assert len({(r, repr(i)) for r, i in pool.calls}) == len(pool.calls)
    for k in range(1, len(pool.calls), 5):
        broken(tmp_path / f"{k}" / "study.db", [k], "kill", of)
        assert stored_rows(tmp_path / f"{k}" / "study.db") == rows


# ---- a larger budget ---------------------------------------------------------------------------------------


def part(rows: dict[str, list[dict[str, Any]]], last: int) -> list[tuple[Any, ...]]:
    """Generation, slot, genome, recipe and score of the candidates of the first generations, the mean left
    out."""
    scores = {e["id"]: (e["score"], e["error"], e["item_set"], e["scores"]) for e in rows["evaluations"]}
    own = [t for t in rows["trials"] if t["generation"] <= last and t["origin"] != "mean"]
    keys = ("generation", "slot", "origin", "label", "genome", "recipe")
    return [(*(t[k] for k in keys), scores[t["evaluation"]]) for t in own]


def test_a_larger_budget_goes_on_where_the_smaller_ended(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome], tmp_path: Path
) -> None:
    rows, _, _ = whole
    search(tmp_path / "large" / "study.db", ToyPool(), plan(evaluations=36))
    large = stored_rows(tmp_path / "large" / "study.db")
    file = tmp_path / "grown" / "study.db"
    search(file, ToyPool())
    pool = ToyPool()
    outcome = search(file, pool, plan(evaluations=36))
    grown = stored_rows(file)
    assert part(grown, 3) == part(rows, 3)
    assert part(grown, 6) == part(large, 6)
    assert len(part(large, 6)) == len(REFERENCES) + 36
    assert grown["trials"][: len(rows["trials"])] == rows["trials"], "what is stored stays as it is"
    assert len({(r, repr(i)) for r, i in pool.calls}) == len(pool.calls)
    assert not [r for r, i in pool.calls if (r, repr(i)) in {(r, repr(i)) for r, i in whole[1].calls}]
    assert outcome.generations == 6
    assert [t["generation"] for t in grown["trials"] if t["origin"] == "mean"] == [3, 6]


def test_the_same_budget_again_changes_nothing(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool())
    pool = ToyPool()
    assert search(file, pool) == whole[2]
    assert pool.calls == []
    assert stored_rows(file) == whole[0]


def test_a_smaller_budget_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Else the outcome would become that of the first candidates, and test items be used again."""
    file = tmp_path / "trial" / "study.db"
    outcome = search(file, ToyPool())
    before = stored_rows(file)
    pool = ToyPool()
    with pytest.raises(StudyError, match=r"up to generation 3.* ends at generation 1"):
        search(file, pool, plan(evaluations=6))
    assert pool.calls == []
    assert stored_rows(file) == before
    assert search(file, ToyPool()) == outcome


def test_a_smaller_budget_of_a_search_that_is_not_over_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    with pytest.raises(Paused):
        search(file, ToyPool(), seen=stop_at("generation 2"))
    before = stored_rows(file)
    with pytest.raises(StudyError, match="ends at generation 1"):
        search(file, ToyPool(), plan(evaluations=6))
    assert stored_rows(file) == before
    assert search(file, ToyPool()).generations == 3


def stop_at(text: str) -> Callable[[Study, Progress], None]:
    """Asks a search to end at a line of its progress."""

    def seen(study: Study, progress: Progress) -> None:
        if text in progress.note:
            study.dispatch.request_stop()

    return seen


def test_an_outcome_is_not_replaced_by_one_of_fewer_finalists(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    outcome = search(file, ToyPool())
    assert len(outcome.finalists) == 3
    before = stored_rows(file)
    with pytest.raises(StudyError, match="chosen among 3 finalists"):
        search(file, ToyPool(), plan(finalists=1))
    assert stored_rows(file) == before


def test_a_budget_of_hours_ends_no_search_before_what_is_stored(tmp_path: Path) -> None:
    """Killed before the end was noted: the replay must not end at its first generation."""
    file = tmp_path / "trial" / "study.db"
    with pytest.raises(Paused):
        search(file, ToyPool(), seen=stop_at("generation 2"))
    with Store.open(file, write=True) as store:
        store.activity.add_driven_seconds(7200)
        pool = ToyPool()
        dispatch = Dispatch(pool, store, budget=Budget(hours=1))
        outcome = Study(plan(), store, pool, dispatch=dispatch).run()
    assert outcome.generations == 2


def test_the_budget_is_reached_in_whole_generations(tmp_path: Path) -> None:
    for evaluations, generations in ((1, 1), (6, 1), (7, 2), (12, 2)):
        outcome = search(tmp_path / f"{evaluations}" / "study.db", ToyPool(), plan(evaluations=evaluations))
        assert outcome.generations == generations


# ---- candidates that fail ----------------------------------------------------------------------------------


def test_failing_candidates_never_end_the_search(tmp_path: Path) -> None:
    for share in (0.1, 0.3):
        pool = ToyPool(lambda recipe, share=share: own(recipe) and uniform("x", recipe.id) < share)
        of = plan(optimizer=lambda s: CmaEs(s, 0.15, population=24, seed=5), evaluations=48)
        outcome = search(tmp_path / f"{share}" / "study.db", pool, of)
        with Store.open(tmp_path / f"{share}" / "study.db") as store:
            failed = [t for t in store.trials() if t.error]
            assert len(failed) >= 3
            assert all(t.score is None and t.recipe_id in str(t.error) for t in failed)
            assert len(store.trials()) == len(REFERENCES) + 49
            for t in failed[:3]:
                assert reports.candidate(store, t)["error"] == t.error
        assert outcome.best["test"] is not None
        assert outcome.best["id"] not in {t.id for t in failed}


def test_failing_references_are_left_out_not_zero(tmp_path: Path) -> None:
    bad = {b.recipe.id for b in REFERENCES if "task arithmetic" in b.label}
    outcome = search(tmp_path / "trial" / "study.db", ToyPool(lambda recipe: recipe.id in bad))
    rows = {r["label"]: r for r in outcome.references}
    for label, row in rows.items():
        if "task arithmetic" in label:
            assert row["search"] is row["validation"] is row["test"] is None
            assert "fails on purpose" in row["error"]
            assert "lead" not in row
        else:
            assert "error" not in row
            assert row["lead_error"] > 0 or row["recipe"] == outcome.best["recipe"]


def test_more_than_half_of_a_generation_failing_ends_it_with_the_first_cause(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    for _ in range(2):  # and again when taken up
        with pytest.raises(
            FailureBudget,
            match=r"of 6 candidates of generation 1 failed; the first because: recipe \w+ fails on purpose",
        ):
            search(file, ToyPool(own))
        with Store.open(file) as store:
            assert store.study().state == "failed"  # type: ignore[union-attr]
            assert len([t for t in store.trials() if t.generation == 1]) == 6, "nothing is lost"


def test_exactly_half_of_a_generation_may_fail(tmp_path: Path) -> None:
    counter: dict[str, int] = {}

    def half(recipe: Recipe) -> bool:
        return own(recipe) and counter.setdefault(recipe.id, len(counter)) % 2 == 0

    assert search(tmp_path / "trial" / "study.db", ToyPool(half)).generations == 3


def test_no_reference_that_can_be_scored_ends_it(tmp_path: Path) -> None:
    with pytest.raises(FailureBudget, match="no parent and no hand recipe"):
        search(tmp_path / "trial" / "study.db", ToyPool(lambda recipe: True))


def test_no_finalist_that_can_be_validated_ends_it(tmp_path: Path) -> None:
    class NoValidation(ToyPool):
        """Fails on validation items."""

        def evaluate(self, recipe: Recipe, items: Items) -> Any:
            self._fails = lambda recipe: items == POOLS["validation"]
            return super().evaluate(recipe, items)

    with pytest.raises(NothingToExport, match="validation"):
        search(tmp_path / "trial" / "study.db", NoValidation())


def test_a_score_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    class Wild(ToyPool):
        """Some metrics are NaN or infinite."""

        def evaluate(self, recipe: Recipe, items: Items) -> Any:
            found = super().evaluate(recipe, items)
            wild = {0: float("nan"), 1: float("inf"), 2: -float("inf")}.get(int(uniform("w", recipe.id) * 12))
            if wild is not None and own(recipe):
                found.metrics["first"] = wild  # type: ignore[index]
            return found

    outcome = search(tmp_path / "trial" / "study.db", Wild(), plan(evaluations=60))
    assert outcome.best["test"] is not None
    with Store.open(tmp_path / "trial" / "study.db") as store:
        bad = [t for t in store.trials() if not -1e9 < sum(t.metrics.values()) < 1e9]
        assert len(bad) >= 3
        assert {t.score for t in bad} == {None}


# ---- what is chosen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("finalists", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_winner_is_never_worse_on_validation_than_a_hand_recipe(
    finalists: int, seed: int, tmp_path: Path
) -> None:
    of = plan(seed=seed, finalists=finalists, optimizer=lambda s: CmaEs(s, 0.6, population=6, seed=seed))
    outcome = search(tmp_path / "trial" / "study.db", ToyPool(), of)
    assert outcome.best["validation"] >= max(r["validation"] for r in outcome.references)
    assert 1 <= len(outcome.finalists) <= finalists


def test_starting_at_the_best_hand_recipe_starts_there(tmp_path: Path) -> None:
    starts: list[Sequence[float]] = []

    def optimizer(start: Sequence[float]) -> CmaEs:
        starts.append(start)
        return CmaEs(start, 0.15, population=6, seed=5)

    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool(), plan(start_at_best=True, optimizer=optimizer))
    with Store.open(file) as store:
        scored = [
            t
            for t in store.trials()
            if t.generation == 0 and store.recipe(t.recipe_id).layers[0].method == "task_arithmetic"
        ]
        best = max(scored, key=lambda t: (t.score or 0.0, -t.slot))
        assert SPACE.decode(starts[0]) == store.recipe(best.recipe_id)
        assert best.score is not None


def test_the_search_finds_more_than_the_hand_recipes(tmp_path: Path) -> None:
    many = {
        role: {task: tuple(f"{role[0]}{i}" for i in range(300)) for task in ("first", "second")}
        for role in POOLS
    }
    of = plan(evaluations=200, items=many, per_generation=60, optimizer=lambda s: CmaEs(s, 0.15, seed=5))
    outcome = search(tmp_path / "trial" / "study.db", ToyPool(), of)
    assert outcome.best["test"] > max(r["test"] for r in outcome.references) + 0.03


def test_the_lead_is_the_paired_difference_on_test_items(
    whole: tuple[dict[str, list[dict[str, Any]]], ToyPool, Outcome], tmp_path: Path
) -> None:
    outcome = whole[2]
    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool())
    with Store.open(file) as store:
        best = {
            (s.task, s.item): s.value
            for s in dict(store.evaluations(outcome.best["recipe"]))["test"].evaluation.items
        }
        for row in outcome.references:
            other = {
                (s.task, s.item): s.value
                for s in dict(store.evaluations(row["recipe"]))["test"].evaluation.items
            }
            mean = variance = 0.0
            for task, share in (("first", 1 / 3), ("second", 2 / 3)):
                d = [best[k] - other[k] for k in best if k[0] == task]
                m = sum(d) / len(d)
                mean += share * m
                variance += share**2 * sum((x - m) ** 2 for x in d) / (len(d) - 1) / len(d)
            assert row["lead"] == pytest.approx(mean, abs=1e-12)
            assert row["lead"] == pytest.approx(outcome.best["test"] - row["test"], abs=1e-12)
            assert row["lead_error"] == pytest.approx(variance**0.5, abs=1e-12)


@pytest.mark.parametrize(("kind", "wanted"), [("mean", (0.2 + 3 * -4.0) / 4), ("worst", -4.0)])
def test_the_objective_is_the_weighted_mean_or_the_worst(kind: Any, wanted: float) -> None:
    objective = Objective((Term("acc"), Term("perplexity", 3.0, -1)), kind)
    assert objective({"acc": 0.2, "perplexity": 4.0}) == pytest.approx(wanted, abs=1e-12)
    assert objective({"acc": 0.9, "perplexity": 2.0}) > objective({"acc": 0.9, "perplexity": 3.0})
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert objective({"acc": bad, "perplexity": 1.0}) != objective({"acc": bad, "perplexity": 1.0}), "NaN"


# ---- a store that is not this search's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        plan(optimizer=lambda start: CmaEs(start, 0.15, population=6, seed=6)),
        plan(optimizer=lambda start: CmaEs(start, 0.2, population=6, seed=5)),
        plan(space=weight_space(groups=(1, 2))),
        plan(baselines=REFERENCES[::-1]),
    ],
    ids=["seed", "sigma", "space", "references"],
)
def test_a_replay_that_differs_is_refused(other: Plan, tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    broken_pool = ToyPool(after=lambda made: (_ for _ in ()).throw(Killed) if made == 25 else None)
    with pytest.raises(Killed):
        search(file, broken_pool)
    before = stored_rows(file)["trials"]
    with pytest.raises(StudyError, match="replay differs"):
        search(file, ToyPool(), other)
    assert stored_rows(file)["trials"] == before


def test_progress_counts_up_to_its_total(tmp_path: Path) -> None:
    seen: list[Progress] = []
    search(tmp_path / "trial" / "study.db", ToyPool(), seen=lambda study, progress: seen.append(progress))
    assert list(dict.fromkeys(p.stage for p in seen)) == [
        "parents and hand recipes",
        "search",
        "means of the distributions",
        "validation",
        "test",
    ]
    for stage in dict.fromkeys(p.stage for p in seen):
        own = [p for p in seen if p.stage == stage]
        assert all(1 <= p.done <= p.total for p in own)
        assert own[-1].done == own[-1].total
        assert [p.done for p in own] == sorted(p.done for p in own)
