"""Texts that a learned stage retains, and its checks: fixed shards, a weight of 0, an end that replays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore, Slopes
from evomerge.optimizers.descent import Leash
from evomerge.recipes import Recipe
from evomerge.search import Plan
from evomerge.search.plan import EarlyStopping, RetainedTexts
from evomerge.spaces.tensor_weights import WEIGHT
from tests.support.learned_search import Learner, learned_plan, run, tensor_space, weight_of
from tests.support.toy import stored_rows
from tests.support.toy_search import Killed

TEXTS = {f"id{number}": f"text {number}" for number in range(10)}
STEPS = 8


class Retainer(Learner):
    """The toy pool of a learned stage; texts of a teacher pull every coefficient towards the teacher's."""

    def __init__(self, **hooks: Any) -> None:
        super().__init__(**hooks)
        self.teachers: set[str] = set()
        self.texts: list[tuple[str, ...]] = []

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        if request.teacher is None:
            return super().slopes(recipe, items, request)
        self.teachers.add(request.teacher.recipe.id)
        (task,) = items
        self.texts.append(tuple(request.teacher.texts[item] for item in items[task]))
        weight = request.weights[task] * len(items[task])
        slopes = self.quadratic(recipe, self.weights(request.teacher.recipe), weight)
        scores = tuple(ItemScore(task, item, 0.25) for item in items[task])
        return Evaluation(recipe.id, scores, {}, {}, slopes=slopes)

    @staticmethod
    def weights(recipe: Recipe) -> dict[tuple[str, str], float]:
        """(tensor, model) -> its weight in a recipe."""
        return {
            (axis.tensor, axis.source): weight_of(recipe, axis.tensor, axis.source)
            for axis in tensor_space().axes
        }

    def quadratic(self, recipe: Recipe, wanted: Mapping[tuple[str, str], float], weight: float) -> Slopes:
        """The weighted square distance of a recipe's coefficients from those that are wanted."""
        off = {key: own - wanted[key] for key, own in self.weights(recipe).items()}
        partials = {(tensor, WEIGHT, source): 2 * weight * d for (tensor, source), d in off.items()}
        return Slopes(weight * sum(d**2 for d in off.values()), partials)


def retained(**changes: Any) -> Plan:
    given: dict[str, Any] = {"texts": TEXTS, "weight": 3.0, "items": 6} | changes
    return learned_plan(retained=RetainedTexts(**given))


def finished(folder: Path, plan: Plan) -> tuple[dict[str, list[dict[str, Any]]], Retainer]:
    """(rows, pool) of a search that nothing interrupted."""
    pool = Retainer()
    assert run(folder / "trial" / "study.db", pool, plan) == "done"
    return stored_rows(folder / "trial" / "study.db"), pool


def test_texts_are_shards_of_every_step_with_the_start_as_teacher(tmp_path: Path) -> None:
    rows, pool = finished(tmp_path, retained())
    genomes = [row["genome"] for row in rows["trials"] if row["origin"] == "learned"]
    first = next(row for row in rows["trials"] if row["genome"] == genomes[0])
    assert pool.teachers == {first["recipe"]}
    assert len(pool.texts) == 2 * STEPS, "6 texts a step in shards of 4"
    assert {text for shard in pool.texts for text in shard} == set(TEXTS.values())
    items = [row["body"] for row in rows["item_sets"] if "retain:" in row["body"]]
    assert items


def test_a_weight_of_nothing_changes_no_row(tmp_path: Path) -> None:
    without, _ = finished(tmp_path / "a", learned_plan())
    with_nothing, pool = finished(tmp_path / "b", retained(weight=0.0))
    assert with_nothing == without
    assert not pool.texts
    with_texts, _ = finished(tmp_path / "c", retained())
    assert with_texts != without


def test_a_teacher_that_is_named_is_taken(tmp_path: Path) -> None:
    space = tensor_space()
    teacher = space.decode([0.125] * len(space.axes))
    _, pool = finished(tmp_path, retained(teacher=teacher))
    assert pool.teachers == {teacher.id}


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_anywhere_it_is_the_same_search(how: str, tmp_path: Path) -> None:
    plan = learned_plan(
        retained=RetainedTexts(TEXTS, 3.0, 6), stopping=EarlyStopping(2, 1), leash=Leash(0.1, 0.5)
    )
    rows, pool = finished(tmp_path / "whole", plan)
    for at in range(1, len(pool.calls), 4):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        file = tmp_path / str(at) / "study.db"
        assert run(file, Retainer(**{how: kill}), plan) == "killed"
        assert run(file, Retainer(), plan) == "done"
        assert stored_rows(file) == rows, at


def test_a_stage_ends_when_its_best_check_is_old(tmp_path: Path) -> None:
    """The toy's metric knows nothing of the loss, so that some check soon is not the best."""
    rows, _ = finished(tmp_path / "a", learned_plan(stopping=EarlyStopping(1, 2)))
    scores = {row["recipe"]: row["score"] for row in rows["evaluations"] if row["role"] == "validation"}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    checked = [scores[row["recipe"]] for row in steps[1:]]
    assert len(steps) < STEPS, "it took every step"
    assert max(checked) not in checked[-1:]
    everything, _ = finished(tmp_path / "b", learned_plan(stopping=EarlyStopping(2)))
    assert len([row for row in everything["trials"] if row["origin"] == "learned"]) == STEPS


def test_no_weight_of_any_step_leaves_the_trust_region(tmp_path: Path) -> None:
    rows, pool = finished(tmp_path, learned_plan(leash=Leash(trust=0.05)))
    for row in rows["recipes"]:
        recipe = Recipe.from_json(row["body"])
        if row["id"] in {trial["recipe"] for trial in rows["trials"] if trial["origin"] == "learned"}:
            found = pool.weights(recipe).values()
            assert max(abs(weight - 0.5) for weight in found) <= 0.05 + 1e-9
