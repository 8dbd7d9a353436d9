"""Budgets that shrink, and test items: what they were used for is counted, shown, and said on the card."""

from __future__ import annotations

import json
from pathlib import Path

from evomerge.store import Store
from tests.support.command_line import Call
from tests.support.toy import stored_rows


def candidates(root: Path) -> tuple[int, int]:
    """Ids of the winner of 'small', and of a sampled candidate that is no winner and no finalist."""
    with Store.open(root / "small" / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        outcome = study.outcome
        apart = {row["recipe"] for row in (outcome.best, *outcome.finalists, *outcome.references)}
        other = next(t.id for t in store.trials() if t.generation and t.recipe_id not in apart)
        return int(outcome.best["id"]), other


def card(root: Path, reference: object, call: Call) -> str:
    """The README.md of an exported candidate, on one line."""
    out = root / f"out-{reference}"
    code, _, err = call("export", f"small/{reference}", out, "--root", root)
    assert code == 0, err
    return " ".join((out / "README.md").read_text().split())


def test_a_budget_below_what_was_done_is_refused_and_changes_nothing(root: Path, call: Call) -> None:
    file = root / "small" / "study.db"
    before = stored_rows(file, ())
    for words in (("resume", "small"), ("run", root / "small.yaml", "--resume")):
        code, out, err = call(*words, "--evaluations", "4", "--root", root)
        assert (code, out) == (2, ""), err
        assert "error[E300]" in err
        assert "8 evaluations are done" in err
        assert "--evaluations 4" in err or "4 evaluations" in err
    assert stored_rows(file, ()) == before


def test_the_budget_of_the_file_below_what_was_done_is_refused(root: Path, call: Call) -> None:
    """After `resume --evaluations +8`, the command that a batch script repeats."""
    assert call("resume", "small", "--evaluations", "+8", "--root", root)[0] == 0
    before = stored_rows(root / "small" / "study.db", ())
    code, _, err = call("run", root / "small.yaml", "--resume", "--root", root)
    assert code == 2
    assert "16 evaluations are done" in err
    assert stored_rows(root / "small" / "study.db", ()) == before
    code, out, _ = call("status", "small", "--root", root)
    assert "test items were used for" in out


def test_a_look_at_test_items_is_stored_counted_and_said(root: Path, call: Call) -> None:
    best, other = candidates(root)
    out = call("status", "small", "--root", root)[1]
    assert "test items were used for 1 winner\n" in out
    assert "validation items did not choose it" not in card(root, best, call)
    words = ("compare", f"small/{best}", f"small/{other}", "--score", "--root", root, "--json")
    code, first, err = call(*words)
    assert code == 0, err
    data = json.loads(call("status", "small", "--root", root, "--json")[1])
    assert data["test_items"] == {"winners": 1, "looks": 1}
    out = call("status", "small", "--root", root)[1]
    assert "test items were used for 1 winner, and by hand for 1 other candidate\n" in out
    assert call(*words)[1] == first, "a second look finds the scores of the first"
    assert json.loads(call("status", "small", "--root", root, "--json")[1])["test_items"]["looks"] == 1
    text = card(root, other, call)
    assert "picked by hand" in text
    assert "scored on test items once, by hand" in text
    report = (root / "small" / "report.md").read_text()
    assert "Test items were used for 1 winner." in report


def test_a_comparison_of_search_items_is_no_look(root: Path, call: Call) -> None:
    best, other = candidates(root)
    rows = stored_rows(root / "small" / "study.db", ())
    words = ("compare", f"small/{best}", f"small/{other}", "--score", "--role", "validation", "--root", root)
    assert call(*words)[0] == 0
    assert stored_rows(root / "small" / "study.db", ()) == rows


def test_the_card_says_who_chose_the_candidate(root: Path, call: Call) -> None:
    best, other = candidates(root)
    text = card(root, best, call)
    assert "Validation items chose this candidate among" in text
    assert "used once, after the choice" in text
    text = card(root, other, call)
    assert "Validation items chose" not in text
    assert f"picked by hand: validation items chose candidate {best}" in text
    assert "was not scored on test items" in text
    text = card(root, "math", call)
    assert "a parent of the search" in text


def test_the_card_of_a_search_that_goes_on_says_so(root: Path, call: Call) -> None:
    best, _ = candidates(root)
    with Store.open(root / "small" / "study.db", write=True) as store:
        store.set_state("running")
    assert "The search has gone on since" in card(root, best, call)


def test_the_card_before_the_end_of_a_search_says_so(root: Path, call: Call) -> None:
    best, _ = candidates(root)
    with Store.open(root / "small" / "study.db", write=True) as store:
        store._change_study(outcome=None, state="paused")
    text = card(root, best, call)
    assert "before the search was over" in text
    assert "Validation items chose" not in text
