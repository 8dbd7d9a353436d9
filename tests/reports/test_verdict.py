"""The verdict on a search in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.reports.verdict import verdict


def row(label: str | None, origin: str, validation: float, test: float, **more: Any) -> dict[str, Any]:
    given = {"id": 7, "label": label, "origin": origin, "recipe": f"recipe of {label}"}
    return {**given, "validation": validation, "test": test, **more}


def study(best: dict[str, Any], *references: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"study": "demo", "state": "done", "alike": "", "best": best, "references": references, **more}


def lead(low: float, high: float) -> dict[str, Any]:
    return {"lead": (low + high) / 2, "lead_error": 0.01, "lead_interval": [low, high]}


@pytest.mark.parametrize(
    ("interval", "kind", "words"),
    [
        ((0.01, 0.05), "better", "demo/7 beats 'TIES .5': 0.600 on test (95 % 0.580 to 0.620), "),
        ((-0.01, 0.05), "tie", "a tie: demo/7 cannot be told from 'TIES .5'"),
        ((-0.05, -0.01), "worse", "demo/7 is worse than 'TIES .5' on the test items"),
    ],
)
def test_a_searched_winner_is_compared_with_the_strongest_of_parents_and_hand_recipes(
    interval: tuple[float, float], kind: str, words: str
) -> None:
    best = row(None, "sampled", 0.62, 0.60, test_interval=[0.58, 0.62])
    parents = [row("math", "parent", 0.5, 0.5, **lead(0.05, 0.15)), row("lang", "parent", 0.4, 0.9)]
    found = verdict(study(best, *parents, row("TIES .5", "hand", 0.59, 0.58, **lead(*interval))))
    assert found.kind == kind
    assert found.sentence.startswith(words)
    assert "+0.100 (95 % +0.050 to +0.150) against the best parent 'math'" in found.sentence
    assert "lang" not in found.sentence, "the highest test score of many owes something to luck"


def test_a_hand_recipe_or_a_parent_that_wins_is_named_first() -> None:
    """Nothing on the screen said that the search had found nothing better than a recipe by hand."""
    parent = row("math", "parent", 0.5, 0.5, **lead(0.0, 0.2))
    hand = row("TIES .5", "hand", 0.6, 0.6)
    found = verdict(study(hand, parent, hand))
    assert found.kind == "hand"
    assert found.sentence.startswith("no searched candidate beat the hand recipe 'TIES .5' on validation")
    found = verdict(study(parent, parent, row("x", "hand", 0.4, 0.4)))
    assert (found.kind, found.sentence) == (
        "parent",
        "no merge beat the parent 'math' on validation (0.500 on test)",
    )


def test_there_is_no_verdict_before_the_end_and_none_of_equals() -> None:
    best = row(None, "sampled", 0.6, 0.6)
    assert verdict(study(best, state="running")).kind == "none"
    assert verdict(study({**best, "test": None})).kind == "untested"
    assert verdict({**study(best), "best": None}).sentence == ""
    assert verdict({**study(best), "alike": "all 3 score alike"}).sentence == "all 3 score alike"
    assert verdict(study(best)).sentence == "demo/7 scores 0.600 on test"
