"""Tasks that tell no model from another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from evomerge.evaluation import Evaluation, ItemScore, Term
from evomerge.evaluation.flat_tasks import find_flat_tasks


def scored(values: Sequence[float], task: str = "a", soft: float | None = None) -> Evaluation:
    items = tuple(ItemScore(task, str(i), value, soft) for i, value in enumerate(values))
    return Evaluation("r", items, {}, {})


@pytest.mark.parametrize(
    ("one", "two", "sign", "said"),
    [
        ([0, 0], [0, 0], 1, "0 of 2 items right for each of x, y"),
        ([0, 0], [0, 0], -1, "each of x, y has 0 on every one of 2 items"),
        ([1, 1], [1, 1], 1, "each of x, y has 1 on every one of 2 items"),
        ([0.3, 1], [0.3, 1], 1, "each of x, y has the same value on every one of 2 items"),
        ([0, 1], [1, 0], 1, ""),
        ([0, 0], [0, 1], 1, ""),
    ],
)
def test_models_that_score_alike_item_by_item(
    one: list[float], two: list[float], sign: int, said: str
) -> None:
    found = find_flat_tasks([Term("a", sign=sign)], {"x": scored(one), "y": scored(two)})
    assert [task.sentence() for task in found] == ([f"task 'a': {said}"] if said else [])


def test_a_group_is_flat_only_where_all_its_tasks_are() -> None:
    group = Term("g", subtasks=(("a", 0.5), ("b", 0.5)))
    x = Evaluation("r", (ItemScore("a", "1", 0.0), ItemScore("b", "1", 0.0)), {}, {})
    y = Evaluation("r", (ItemScore("a", "1", 0.0), ItemScore("b", "1", 1.0)), {}, {})
    assert not find_flat_tasks([group], {"x": x, "y": y})
    assert find_flat_tasks([group], {"x": x, "z": x})[0].is_floor


def test_a_failed_model_and_a_single_one_say_little() -> None:
    failed = Evaluation("r", (), {}, {}, error="no")
    assert not find_flat_tasks([Term("a")], {"x": scored([1, 1]), "y": failed})
    assert find_flat_tasks([Term("a")], {"x": scored([0, 0]), "y": failed})[0].models == ("x",)
    assert not find_flat_tasks([Term("a")], {"y": failed})


def test_a_search_by_a_soft_metric_has_a_signal() -> None:
    models = {"x": scored([0, 0], soft=0.1), "y": scored([0, 0], soft=0.2)}
    assert not find_flat_tasks([Term("a", search=(("probability", 1.0),))], models)


def test_few_items_that_are_right_or_wrong_may_be_alike_by_chance() -> None:
    for values, certain in (([0] * 9, False), ([0] * 10, True), ([0, 0.1, 0.2], True)):
        found = find_flat_tasks([Term("a")], {"x": scored(values), "y": scored(values)})
        assert [task.is_certain for task in found] == [certain]
