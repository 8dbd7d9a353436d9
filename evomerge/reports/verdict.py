"""The verdict on a search in one sentence: what won, by how much, and whether that can be told from luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["none", "alike", "untested", "better", "tie", "worse", "hand", "parent"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a search found.

    Attributes:
        kind: 'none' before the end; 'alike' where all candidates score alike; 'untested' where the winner has
            no test score; 'parent' or 'hand' where a parent or a hand recipe won on validation. Of a searched
            winner against the strongest of parents and hand recipes on the test items: 'better', 'worse', or
            'tie', where the 95 % interval of the difference holds 0 or is not known.
        sentence: That in words, without a full stop; '' before the end.
    """

    kind: Kind
    sentence: str


def verdict(data: Mapping[str, Any]) -> Verdict:
    """Says what a search found.

    The strongest parent and hand recipe are those with the highest validation score: that of the highest test
    score would owe something to luck.

    Args:
        data: As `evomerge.reports.study_summary` gives it.

    Returns:
        The verdict.
    """
    best = data["best"]
    if data["alike"]:
        return Verdict("alike", str(data["alike"]))
    if data["state"] != "done" or not best or "validation" not in best:
        return Verdict("none", "")
    name = f"{data['study']}/{best['id']}"
    if best.get("test") is None:
        why = f": {best['error']}" if best.get("error") else ""
        return Verdict("untested", f"{name} won on validation and could not be scored on the test items{why}")
    score = f"{best['test']:.3f} on test{_between(best.get('test_interval'))}"
    parent = _strongest(data["references"], "parent", best)
    if best["origin"] == "parent":
        return Verdict("parent", f"no merge beat the parent '{best['label']}' on validation ({score})")
    if best["origin"] == "hand":
        against = f", {_difference(parent, 'parent')}" if parent else ""
        sentence = f"no searched candidate beat the hand recipe '{best['label']}' on validation ({score})"
        return Verdict("hand", sentence + against)
    hand = _strongest(data["references"], "hand", best)
    rivals = [row for row in (parent, hand) if row is not None]
    if not rivals:
        return Verdict("better", f"{name} scores {score}")
    strongest = max(rivals, key=lambda row: row.get("validation") or 0.0)
    kind = _kind(strongest)
    parts = [_difference(row, noun) for row, noun in ((parent, "parent"), (hand, "hand recipe")) if row]
    opening = {
        "better": f"{name} beats '{strongest['label']}'",
        "tie": f"a tie: {name} cannot be told from '{strongest['label']}'",
        "worse": f"{name} is worse than '{strongest['label']}' on the test items",
    }[kind]
    return Verdict(kind, f"{opening}: {score}, {', '.join(parts)}")


def strongest_references(data: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, ...]:
    """Finds the parent and the hand recipe that a winner is compared with.

    Args:
        data: As `evomerge.reports.study_summary` gives it.

    Returns:
        (row of the best parent, row of the best hand recipe) by validation, by search before the end; None
        where there is none, or it is the best itself.
    """
    best = data["best"] or {}
    return tuple(_strongest(data["references"], origin, best) for origin in ("parent", "hand"))


def _strongest(
    rows: Sequence[Mapping[str, Any]], origin: str, best: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    scored = [
        row
        for row in rows
        if row["origin"] == origin and row["recipe"] != best.get("recipe") and _rank(row) is not None
    ]
    return max(scored, key=lambda row: _rank(row) or 0.0, default=None)


def _rank(row: Mapping[str, Any]) -> float | None:
    """Validation score, or the search score where there is none."""
    value = row.get("validation", row.get("search"))
    return None if value is None else float(value)


def _kind(row: Mapping[str, Any]) -> Literal["better", "tie", "worse"]:
    """How the winner compares with a parent or hand recipe."""
    low, high = row.get("lead_interval") or (0.0, 0.0)
    if low > 0:
        return "better"
    return "worse" if high < 0 else "tie"


def _difference(row: Mapping[str, Any] | None, noun: str) -> str:
    """'+0.050 (95 % 0.030 to 0.070) against the best parent 'math''."""
    assert row is not None
    if "lead" not in row:
        return f"the best {noun} '{row['label']}' has no test score"
    interval = row.get("lead_interval")
    between = f" (95 % {interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
    return f"{row['lead']:+.3f}{between} against the best {noun} '{row['label']}'"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" (95 % {interval[0]:.3f} to {interval[1]:.3f})"
