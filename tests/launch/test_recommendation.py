"""What `evomerge plan` recommends: a learned stage where there is a gradient, sized by items and budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.launch.recommendation import recommend
from evomerge.methods import method
from tests.support.toy import in_process, search_file

SUM = method("task_arithmetic")


def test_where_the_method_has_no_gradient_evolution_is_recommended_with_the_reason() -> None:
    found = recommend(method("slerp"), "", 4, 500, 230_400)
    assert found["stage"] == {"stage": "weights"}
    assert found["item_forwards"] == 230_400
    assert "'slerp' is no sum of task vectors" in found["reasons"][0]


def test_where_a_task_has_no_text_that_is_the_reason() -> None:
    found = recommend(SUM, "task 'size' has no text with a right answer", 4, 500, 230_400)
    assert found["stage"] == {"stage": "weights"}
    assert found["reasons"] == ["task 'size' has no text with a right answer"]


@pytest.mark.parametrize(
    ("fewest", "budget", "genome", "steps", "items"),
    [
        (500, 14_400, "tensor", 40, 30),
        (500, 10**9, "tensor", 110, 30),
        (500, 9_360, "tensor", 26, 30),
        (500, 9_359, "tensor", 51, 15),
        (500, 4_680, "tensor", 26, 15),
        (500, 1, "tensor", 10, 15),
        (32, 14_400, "tensor", 40, 30),
        (31, 14_400, "space", 40, 30),
        (16, 5_760, "space", 32, 15),
        (8, 5_760, "space", 60, 8),
    ],
)
def test_steps_fill_the_budget_within_what_was_measured(
    fewest: int, budget: int, genome: str, steps: int, items: int
) -> None:
    found = recommend(SUM, "", 4, fewest, budget)
    assert found["stage"] == {"stage": "learned", "genome": genome, "steps": steps, "items": items}
    assert found["item_forwards"] == 3 * items * 4 * steps
    assert found["item_forwards"] <= max(budget, 3 * items * 4 * 10)


@pytest.mark.parametrize(("budget", "is_said"), [(4_680, True), (14_400, False)])
def test_fewer_items_a_step_come_with_the_reason(budget: int, is_said: bool) -> None:
    reasons = " ".join(recommend(SUM, "", 4, 500, budget)["reasons"])
    assert ("26 steps of 15 items a task scored above 13 of 30" in reasons) == is_said


def test_plan_prints_it(tmp_path: Path) -> None:
    code, out, err = in_process("plan", search_file(tmp_path, "planned", evaluations=450))
    assert code == 0, err
    assert (
        "recommended first stage: {stage: learned, genome: tensor, steps: 40, items: 30}, 14400 item" in out
    )
