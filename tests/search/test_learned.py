"""A learned stage: replay-exact wherever it is broken off, its steps free of scores, its end as finalist."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import FailureBudget
from evomerge.evaluation import Evaluation, Items
from evomerge.evaluation.records import mean_metrics
from evomerge.recipes import Recipe
from evomerge.store import Store
from tests.support.learned_search import ITEMS, SHARD, STEPS, Learner, run, target, tensor_space
from tests.support.toy import stored_rows
from tests.support.toy_search import Killed, plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[dict[str, Any]]], Learner]:
    """(rows, pool) of a learned search that nothing interrupted."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    pool = Learner()
    assert run(file, pool) == "done"
    return stored_rows(file), pool


def test_each_step_is_a_trial_without_a_score_and_the_end_is_scored_and_validated(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner],
) -> None:
    rows, _ = whole
    scores = {row["id"]: row["score"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [row["generation"] for row in steps] == list(range(1, STEPS + 1))
    assert all(scores[row["evaluation"]] is None for row in steps)
    ends = [row for row in rows["trials"] if row["origin"] == "mean"]
    assert ends[0]["label"] == "end of the learned stage"
    assert len(ends) == 3
    assert all(scores[row["evaluation"]] is not None for row in ends)
    for before, after in itertools.pairwise(steps):
        assert after["parents"] == f"[{before['id']}]"


def test_a_step_goes_down_the_loss(whole: tuple[dict[str, list[dict[str, Any]]], Learner]) -> None:
    rows, _ = whole
    genomes = [row["genome"] for row in rows["trials"] if row["origin"] == "learned"]
    space = tensor_space()
    off = [
        sum(
            (value - target(axis.tensor, axis.source)) ** 2
            for value, axis in zip(json.loads(genome), space.axes, strict=True)
        )
        for genome in genomes
    ]
    assert off[-1] < 0.3 * off[0]


def test_a_step_is_cut_into_shards_whose_slopes_are_stored(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner],
) -> None:
    rows, pool = whole
    gradients = [row for row in rows["evaluations"] if row["role"] == "gradient"]
    shards = -(-2 * ITEMS // SHARD)
    assert pool.learned == STEPS * shards
    assert len(gradients) == STEPS * (shards + 1)
    assert all(row["slopes"] for row in gradients)


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_at_any_evaluation_and_resumed_it_is_the_same_search(
    how: str, whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    rows, pool = whole
    for at in range(1, len(pool.calls), 5):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        file = tmp_path / str(at) / "study.db"
        assert run(file, Learner(**{how: kill})) == "killed"
        assert run(file, Learner()) == "done"
        assert stored_rows(file) == rows, at


def test_a_stop_pauses_between_shards_and_nothing_is_scored_again(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    rows, pool = whole
    first = Learner()

    def stop(made: int) -> None:
        if made == 20:
            first.study.dispatch.request_stop()  # type: ignore[attr-defined]

    first._before = stop
    assert run(tmp_path / "trial" / "study.db", first) == "paused"
    second = Learner()
    assert run(tmp_path / "trial" / "study.db", second) == "done"
    assert stored_rows(tmp_path / "trial" / "study.db") == rows
    assert len(first.calls) + len(second.calls) == len(pool.calls)


def test_a_step_that_fails_is_a_value_and_the_next_begins_half_way_back(tmp_path: Path) -> None:
    shards = -(-2 * ITEMS // SHARD)
    assert run(tmp_path / "trial" / "study.db", Learner(fails_at=[3 * shards + 1])) == "done"
    rows = stored_rows(tmp_path / "trial" / "study.db")
    errors = {row["id"]: row["error"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [bool(errors[row["evaluation"]]) for row in steps] == [number == 3 for number in range(STEPS)]
    before, failed, after = (json.loads(steps[number]["genome"]) for number in (2, 3, 4))
    assert after == pytest.approx([(x + y) / 2 for x, y in zip(before, failed, strict=True)], abs=2e-4)


def test_a_step_that_failed_by_its_machine_is_taken_out_with_all_that_came_of_it(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    file = tmp_path / "trial" / "study.db"
    shards = -(-2 * ITEMS // SHARD)
    assert run(file, Learner(fails_at=[3 * shards + 1])) == "done"
    with Store.open(file, write=True) as store:
        forgotten = store.retry.forget(lambda error: "not finite" in error, plan().objective.task_values)
        assert forgotten is not None
        assert forgotten.generation == 4
    assert run(file, Learner()) == "done"
    assert stored_rows(file) == whole[0]


def test_steps_that_fail_one_after_the_other_end_the_search_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(FailureBudget, match=r"3 steps .* not finite"):
        run(tmp_path / "trial" / "study.db", Learner(fails_at=range(1, 100)))


def test_rows_do_not_depend_on_the_order_in_which_shards_come(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    class Backwards(Learner):
        def submit(self, jobs: Sequence[Any]) -> None:
            super().submit(list(reversed(jobs)))

    assert run(tmp_path / "trial" / "study.db", Backwards()) == "done"
    assert stored_rows(tmp_path / "trial" / "study.db") == whole[0]


class UnsurePool(Learner):
    """Gives right answers a probability that ranks recipes against the metric's order."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        found = super().evaluate(recipe, items)
        scores = tuple(replace(s, probability=1 - s.value, logprob=-1.0) for s in found.items)
        metrics = {name: value for task in items for name, value in mean_metrics(task, [
            score for score in scores if score.task == task
        ]).items()}  # fmt: skip
        return replace(found, items=scores, metrics=metrics)


@pytest.mark.parametrize("pool", [Learner(), UnsurePool()], ids=["scores alone", "probabilities"])
def test_a_descent_begins_where_right_answers_are_likeliest_not_where_few_items_score_best(
    pool: Learner, tmp_path: Path
) -> None:
    file = tmp_path / "trial" / "study.db"
    assert run(file, pool) == "done"
    with Store.open(file) as store:
        trials = store.trials()
        space = tensor_space()
        known = [t for t in trials if t.generation == 0 and space.encode(store.recipe(t.recipe_id))]
    first = next(t for t in trials if t.origin == "learned")
    scores = {t.id: t.score for t in known}
    assert len(set(scores.values())) > 1
    best = max if type(pool) is Learner else min  # the probabilities fall as scores rise
    assert first.parents == (best(scores, key=lambda number: scores[number] or 0.0),)
