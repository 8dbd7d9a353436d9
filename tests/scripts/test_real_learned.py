"""What scripts/benchmarks/real_learned.py says of rows: scores, paired differences, what the intervals tell;
and that training rows of evaluators/real are in no split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks import real_learned

EVALUATORS = Path(__file__).resolve().parents[2] / "evaluators" / "real"
TASKS = real_learned.TASKS
Row = dict[str, Any]


def items(*right: int, of: int = 20) -> list[list[Any]]:
    """Test items of which the first so many of each task are right."""
    return [
        [task, f"item {number}", float(number < count)]
        for task, count in zip(TASKS, right, strict=True)
        for number in range(of)
    ]


def scored(values: list[list[Any]], validation: float, origin: str = "mean", label: str = "") -> Row:
    metrics = {task: sum(v for name, _, v in values if name == task) / 20 for task in TASKS}
    return {
        "origin": origin,
        "label": label,
        "validation": validation,
        "test": sum(metrics.values()) / len(TASKS),
        "test_metrics": metrics,
        "items": values,
    }


def arm(name: str, seed: int, values: list[list[Any]]) -> Row:
    numbers = {"genes": 4, "cost": 1440, "seconds": 60.0, "commit": "abc"}
    return {"arm": name, "seed": seed, **numbers, **scored(values, 0.5)}


@pytest.fixture
def rows() -> list[Row]:
    better_on_test = scored(items(20, 20, 20), 0.4, "hand", "lucky")
    best = scored(items(10, 10, 10), 0.6, "hand", "chosen")
    base = scored(items(2, 4, 6), 0.9, "parent", "base")
    return [
        {**arm("references", 0, items(10, 10, 10)), "references": [base, better_on_test, best]},
        arm("tensor", 0, items(20, 20, 20)),
        arm("tensor", 1, items(10, 10, 10)),
        arm("cma", 0, items(10, 11, 10)),
        arm("cma", 1, items(10, 10, 10)),
    ]


def table(text: str, heading: str) -> list[list[str]]:
    section = text.partition(f"## {heading}")[2].partition("## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_differences_are_paired_and_the_hand_recipe_is_chosen_on_validation(
    rows: list[Row],
) -> None:
    text = real_learned.report(rows)
    found = {(row[0], row[1]): row[2:] for row in table(text, "Differences")}
    hand = "best hand recipe (chosen, chosen on validation)"
    learned, cma = "learned, tensor", "CMA-ES, the space's axes"
    assert {key: row[0] for key, row in found.items()} == {
        (f"{cma} − {hand}", "0"): "+0.017",  # one item of 60
        (f"{cma} − {hand}", "1"): "+0.000",
        (f"{cma} − {hand}", "mean"): "+0.008",
        (f"{learned} − {hand}", "0"): "+0.500",
        (f"{learned} − {hand}", "1"): "+0.000",
        (f"{learned} − {hand}", "mean"): "+0.250",
        (f"{learned} − {cma}", "0"): "+0.483",  # 29 items of 60
        (f"{learned} − {cma}", "1"): "+0.000",
        (f"{learned} − {cma}", "mean"): "+0.242",
    }
    assert found[f"{learned} − {hand}", "1"][1] == "+0.000 to +0.000", "the same answers"
    low, high = map(float, found[f"{learned} − {cma}", "0"][1].split(" to "))
    assert 0 < low < 0.483 < high < 1
    assert "Of 6 paired intervals 2 lie above 0, 0 below, and\n4 hold it" in text


def test_scores_are_means_of_tasks(rows: list[Row]) -> None:
    text = real_learned.report(rows)
    base = table(text, "Parents")[0]
    assert base[0] == "base"
    assert base[2].startswith("0.200 (")
    assert base[3:] == ["0.10", "0.20", "0.30"]
    searches = table(text, "Searches")
    assert [(row[0], row[1], row[7].partition(" ")[0]) for row in searches] == [
        ("CMA-ES, the space's axes", "0", "0.517"),
        ("CMA-ES, the space's axes", "1", "0.500"),
        ("learned, tensor", "0", "1.000"),
        ("learned, tensor", "1", "0.500"),
    ]


def test_a_report_of_no_rows_has_empty_tables() -> None:
    text = real_learned.report([])
    assert table(text, "Searches") == table(text, "Differences") == []
    assert "Of 0 paired intervals" in text


@pytest.mark.parametrize("arm", ["cma", "tensor", "space"])
def test_arms_cost_the_same(arm: str) -> None:
    document = real_learned.document_of(arm, 0, Path("models"))
    tasks = len(document["tasks"])
    if arm == "cma":
        cost = document["search"]["evaluations"] * document["evaluation"]["items"] * tasks
    else:
        (stage,) = document["stages"]
        cost = 3 * stage["steps"] * stage["items"] * tasks
    assert cost == real_learned.BUDGET


@pytest.mark.parametrize("task", TASKS)
def test_no_row_has_two_roles(task: str) -> None:
    rows = [
        row
        for role in ("parents", "search", "validation", "test")
        for row in (EVALUATORS / f"{task}.{role}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(set(rows)) >= 250
    assert all(isinstance(json.loads(row), dict) for row in rows)
