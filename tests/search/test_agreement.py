"""Whether a learned stage's surrogate follows the metrics: measured at its end and stored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore
from evomerge.recipes import Recipe
from evomerge.store import Agreement, Store
from tests.support.landscape import height
from tests.support.learned_search import Learner, learned_plan, run
from tests.support.toy import stored_rows
from tests.support.toy_search import POOLS, Killed

ITEMS = 20  # all validation items of a task of the toy search, fewer than are asked for


class Honest(Learner):
    """The probability of a right answer is the height of the landscape, or falls with it."""

    sign = 1

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        if request.derivatives:
            return super().slopes(recipe, items, request)
        self.requests.append(request)
        p = height(recipe) if self.sign > 0 else 1 - height(recipe)
        scores = tuple(ItemScore(task, item, p, p, -1.0) for task, ids in items.items() for item in ids)
        return Evaluation(recipe.id, scores, {}, {})


class Contrary(Honest):
    sign = -1


class Known(Learner):
    """Scores hold the probability already."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        found = super().evaluate(recipe, items)
        p = height(recipe)
        return replace(
            found, items=tuple(replace(s, probability=p, logprob=math.log(p + 1e-300)) for s in found.items)
        )


def agreement(folder: Path, pool: Learner, **changes: Any) -> Agreement | None:
    """What a search of one learned stage stores."""
    file = folder / "trial" / "study.db"
    assert run(file, pool, learned_plan(**changes)) == "done"
    with Store.open(file) as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        return study.outcome.stages[0].agreement


def test_it_is_the_rank_correlation_over_parents_hand_recipes_and_finalists(tmp_path: Path) -> None:
    found = agreement(tmp_path, Honest())
    assert found is not None
    rows = stored_rows(tmp_path / "trial" / "study.db")
    bodies = {row["id"]: Recipe.from_json(row["body"]) for row in rows["recipes"]}
    asked = [row for row in rows["evaluations"] if row["role"] == "surrogate"]
    names = [row["recipe"] for row in asked]
    trials = {row["recipe"] for row in rows["trials"] if row["origin"] in ("parent", "hand", "mean")}
    assert set(names) == trials
    assert found.candidates == len(names)
    values: dict[str, list[list[float]]] = {}
    for row in rows["evaluations"]:
        if row["role"] == "validation":
            scores = json.loads(row["scores"])
            values[row["recipe"]] = [scores[:ITEMS], scores[ITEMS:]]
    heights = [height(bodies[name]) for name in names]
    for place, task in enumerate(("first", "second")):
        means = [math.fsum(values[name][place]) for name in names]
        assert found.tasks[task] == pytest.approx(float(spearmanr(heights, means)[0]), abs=1e-9)
    whole = [math.fsum(values[n][0]) + 2 * math.fsum(values[n][1]) for n in names]
    assert found.correlation == pytest.approx(float(spearmanr(heights, whole)[0]), abs=1e-9)
    assert found.correlation > 0.5
    assert found.sentence == ""


def test_its_items_are_validation_items_and_its_forwards_are_counted(tmp_path: Path) -> None:
    found = agreement(tmp_path, Honest())
    assert found is not None
    assert found.items == 2 * ITEMS
    assert found.forwards == found.candidates * 2 * ITEMS
    rows = stored_rows(tmp_path / "trial" / "study.db")
    sets = {row["id"]: dict(json.loads(row["body"])) for row in rows["item_sets"]}
    asked = [sets[row["item_set"]] for row in rows["evaluations"] if row["role"] == "surrogate"]
    assert all(set(ids) == set(POOLS["validation"][task]) for own in asked for task, ids in own.items())


def test_a_surrogate_that_does_not_follow_says_what_to_do(tmp_path: Path) -> None:
    found = agreement(tmp_path, Contrary())
    assert found is not None
    assert found.correlation is not None
    assert found.correlation < 0
    assert found.sentence == "the surrogate does not follow the metric here: add a stage of weights"


def test_where_scores_hold_the_probability_nothing_is_asked_for(tmp_path: Path) -> None:
    pool = Known()
    found = agreement(tmp_path, pool)
    assert found is not None
    assert found.forwards == 0
    assert found.items == 2 * ITEMS
    assert found.correlation is not None
    assert found.correlation > 0.5
    assert all(request.derivatives for request in pool.requests)


def test_a_task_that_is_left_out_is_not_compared(tmp_path: Path) -> None:
    found = agreement(tmp_path, Honest(), labels={"first": "none", "second": "a"})
    assert found is not None
    assert set(found.tasks) == {"second"}


def test_candidates_that_are_all_alike_have_no_correlation(tmp_path: Path) -> None:
    found = agreement(tmp_path, Learner())  # the toy's probability is a half everywhere
    assert found is not None
    assert found.correlation is None
    assert found.sentence == ""


def test_killed_while_it_is_measured_and_resumed_it_is_the_same(tmp_path: Path) -> None:
    whole = Honest()
    wanted = agreement(tmp_path / "whole", whole)
    asked = [i for i, (_, items) in enumerate(whole.calls, 1) if "v0" in next(iter(items.values()))]
    for at in (asked[0], asked[len(asked) // 2], asked[-1]):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        folder = tmp_path / str(at)
        assert run(folder / "trial" / "study.db", Honest(after=kill), learned_plan()) == "killed"
        assert agreement(folder, Honest()) == wanted
