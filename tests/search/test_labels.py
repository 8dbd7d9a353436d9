"""Labels of a learned stage: whose answers stand for the right ones, made once, on the items of its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError, FailureBudget
from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.search import labels
from evomerge.search.item_windows import ItemWindows
from tests.support.landscape import height, uniform
from tests.support.learned_search import ITEMS, STEPS, Learner, learned_plan, run
from tests.support.toy import stored_rows
from tests.support.toy_search import POOLS, REFERENCES, Killed

PARENTS = {str(b.label): b.recipe for b in REFERENCES if b.origin == "parent"}
FROM_A = {"first": "a", "second": "none"}


def labelled(file: Path, sources: dict[str, str], pool: Learner | None = None) -> Learner:
    """A search whose steps climb labels, to its end; the pool."""
    pool = pool or Learner()
    assert run(file / "trial" / "study.db", pool, learned_plan(labels=sources)) == "done"
    return pool


def climbed(pool: Learner) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Task -> item -> labels that steps were given."""
    found: dict[str, dict[str, tuple[Any, ...]]] = {}
    for request in [request for request in pool.requests if request.derivatives]:
        for task, own in request.labels.items():
            found.setdefault(task, {}).update({item: tuple(answers) for item, answers in own.items()})
    return found


def answered(item: str) -> bool:
    """Whether the toy models answer an item."""
    return uniform("none", item) >= 1 / 6


def test_the_answers_of_a_model_stand_for_the_right_ones_of_its_task(tmp_path: Path) -> None:
    pool = labelled(tmp_path, FROM_A)
    found = climbed(pool)
    assert set(found) == {"first"}
    assert all(own == (f"{PARENTS['a'].id} of {item}",) for item, own in found["first"].items())
    asked = {item for step in range(STEPS) for item in pool_items(step + 1)["first"]}
    assert set(found["first"]) <= {item for item in asked if answered(item)}


def pool_items(step: int) -> Items:
    """The items of a step without labels."""
    return ItemWindows(POOLS["search"], ITEMS, 5).items(step)


def test_a_task_that_is_left_out_has_no_items_and_gives_its_weight_to_the_others(tmp_path: Path) -> None:
    pool = labelled(tmp_path, FROM_A)
    assert all(set(request.weights) == {"first"} for request in pool.requests)
    rows = stored_rows(tmp_path / "trial" / "study.db")
    sets = {row["id"]: json.loads(row["body"]) for row in rows["item_sets"]}
    steps = [row for row in rows["evaluations"] if row["role"] == "gradient"]
    assert all([task for task, _ in sets[row["item_set"]]] == ["first"] for row in steps)
    of_step = [request.weights["first"] for request in pool.requests[:1]]
    assert of_step == [pytest.approx(1 / ITEMS)]


def test_a_task_without_an_entry_keeps_its_own_answers_and_items(tmp_path: Path) -> None:
    pool = labelled(tmp_path, {"first": "a"})
    assert set(climbed(pool)) == {"first"}
    plain = Learner()
    assert run(tmp_path / "plain" / "study.db", plain, learned_plan()) == "done"
    both = [(tmp_path / "trial", pool), (tmp_path / "plain", plain)]
    seconds = []
    for folder, _ in both:
        rows = stored_rows(folder / "study.db")
        sets = {row["id"]: dict(json.loads(row["body"])) for row in rows["item_sets"]}
        steps = [row for row in rows["trials"] if row["origin"] == "learned"]
        of = {row["id"]: row["item_set"] for row in rows["evaluations"]}
        seconds.append([sets[of[row["evaluation"]]]["second"] for row in steps])
    assert seconds[0] == seconds[1]


def test_samples_are_the_answers_of_all_models_that_the_metric_finds_right(tmp_path: Path) -> None:
    found = climbed(labelled(tmp_path, {"first": "samples", "second": "none"}))["first"]
    assert found
    for item, own in found.items():
        right = [r for r in PARENTS.values() if uniform(r.id, "first", item) < height(r)]
        assert own == tuple(f"{recipe.id} of {item}" for recipe in right), item


def test_labels_are_an_evaluation_of_their_model_and_are_made_once(tmp_path: Path) -> None:
    labelled(tmp_path, FROM_A)
    rows = stored_rows(tmp_path / "trial" / "study.db")
    sets = {row["id"]: dict(json.loads(row["body"])) for row in rows["item_sets"]}
    of_search = [
        row
        for row in rows["evaluations"]
        if row["role"] == "labels" and set(sets[row["item_set"]]["first"]) <= set(POOLS["search"]["first"])
    ]
    (row,) = of_search
    assert row["recipe"] == PARENTS["a"].id
    items = sets[row["item_set"]]["first"]
    answers = json.loads(row["answers"])
    assert answers == [f"{row['recipe']} of {i}" if answered(i) else None for i in items]
    assert len(json.loads(row["scores"])) == len(items)


def test_killed_at_any_evaluation_and_resumed_it_climbs_the_same_labels(tmp_path: Path) -> None:
    sources = {"first": "samples", "second": "a"}
    whole = labelled(tmp_path, sources)
    rows = stored_rows(tmp_path / "trial" / "study.db")
    of = learned_plan(labels=sources)
    for at in range(8, len(whole.calls), 9):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        file = tmp_path / str(at) / "study.db"
        assert run(file, Learner(before=kill), of) == "killed"
        assert run(file, Learner(), of) == "done"
        assert stored_rows(file) == rows, at


def test_a_task_that_nobody_answers_ends_the_search_with_the_remedy(tmp_path: Path) -> None:
    class Silent(Learner):
        def answers(self, recipe: Recipe, items: Items) -> Evaluation:
            scored = self.evaluate(recipe, items)
            return Evaluation(
                recipe.id, scored.items, scored.metrics, {}, answers=(None,) * len(scored.items)
            )

    with pytest.raises(ConfigError, match=r"'a' gives no complete answer to any of \d+ items; .*first: none"):
        labelled(tmp_path, FROM_A, Silent())
    with pytest.raises(ConfigError, match="no model answers right"):
        labelled(tmp_path / "samples", {"first": "samples"}, Silent())


def test_a_model_that_cannot_answer_ends_the_search_with_the_cause(tmp_path: Path) -> None:
    class Broken(Learner):
        def answers(self, recipe: Recipe, items: Items) -> Evaluation:
            return Evaluation(recipe.id, (), {}, {}, error="the model's logits are NaN")

    with pytest.raises(FailureBudget, match=r"answers of 'a', .* cannot be had: the model's logits are NaN"):
        labelled(tmp_path, FROM_A, Broken())


def test_labels_of_a_group_are_those_of_its_tasks() -> None:
    from evomerge.evaluation import Objective, Term

    objective = Objective((Term("group", subtasks=(("x", 0.5), ("y", 0.5))), Term("z")))
    assert labels.by_subtask({"group": "a", "z": "none"}, objective) == {"x": "a", "y": "a", "z": "none"}
