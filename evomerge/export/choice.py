"""What is true of an exported candidate, in sentences: chosen by what, scored on test items how often."""

from __future__ import annotations

from evomerge.export.stored_candidate import StoredCandidate
from evomerge.store import Tested

_TIMES = {1: "once", 2: "twice"}


def sentences(candidate: StoredCandidate) -> list[str]:
    """Says what chose a candidate, and what test items have to do with it.

    Args:
        candidate: The candidate.

    Returns:
        Sentences for its model card.
    """
    uses = candidate.store.usage.test_uses()
    return [*_choice(candidate), _tests(candidate, uses), *_winners(candidate, uses)]


def _is_winner(candidate: StoredCandidate) -> bool:
    outcome = candidate.study.outcome
    return outcome is not None and outcome.best.get("recipe") == candidate.trial.recipe_id


def _choice(candidate: StoredCandidate) -> list[str]:
    outcome, origin = candidate.study.outcome, candidate.trial.origin
    what = {"parent": "a parent of the search", "hand": "a hand recipe of the search"}.get(origin, "")
    kind = f"This candidate is {what}, and was" if what else "This candidate was"
    if outcome is None:
        return [f"{kind} picked by hand before the search was over: no validation items have chosen it."]
    if not _is_winner(candidate):
        best = outcome.best["id"]
        return [f"{kind} picked by hand: validation items chose candidate {best}, not this one."]
    among = f"{len(outcome.finalists)} finalists and {len(outcome.references)} parents and hand recipes"
    chosen = [f"Validation items chose this candidate among {among}."]
    if candidate.study.state != "done":
        chosen.append("The search has gone on since, and may choose another.")
    return chosen


def _tests(candidate: StoredCandidate, uses: list[Tested]) -> str:
    use = next((use for use in uses if use.recipe_id == candidate.trial.recipe_id), None)
    if use is None:
        return "It was not scored on test items."
    looks = f"scored on test items {_times(use.looks)}, by hand (`evomerge compare --score`)"
    if not use.tests:
        return f"It was {looks}."
    if use.is_reference and not _is_winner(candidate):
        tests = f"Test items were used {_times(use.tests)}, to compare the winner with it"
    else:
        tests = f"Test items were used {_times(use.tests)}, after the choice"
    return f"{tests}; it was also {looks}." if use.looks else f"{tests}."


def _winners(candidate: StoredCandidate, uses: list[Tested]) -> list[str]:
    """A sentence where the study's test items were used for more than this candidate's choice."""
    winners = [use.recipe_id for use in uses if use.tests and not use.is_reference]
    looks = [use.recipe_id for use in uses if use.looks and use.recipe_id != candidate.trial.recipe_id]
    others = [name for name in winners if name != candidate.trial.recipe_id]
    lines = []
    if others and (_is_winner(candidate) or len(winners) > 1):
        lines.append(
            f"Test items of this study were used for {len(winners)} winners, one after another: "
            "a test score that others came before is no longer that of unseen items."
        )
    if looks:
        plural = "s" if len(looks) > 1 else ""
        lines.append(f"Somebody looked at the test scores of {len(looks)} other candidate{plural} by hand.")
    return lines


def _times(count: int) -> str:
    return _TIMES.get(count, f"{count} times")
