"""What is said of a search once it is over: estimates, finalists, tests, the headline number, luck, and skills kept or lost.

Plain rows from item scores; nothing is scored here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evomerge.evaluation import Items, ItemScore, Objective
from evomerge.statistics import Estimate, ItemMeans, control_variate, holm, luck, paired, stratified
from evomerge.store import Scored, Store, Trial

ALARM = 1.96
"""A skill is said to be lost where it falls by more than this many standard errors: 2.5 % a comparison, not corrected for
their number, as an alarm is to be looked at and a loss passed over is not."""


def estimates(store: Store, objective: Objective, pool: Items, trials: Sequence[Trial], last: int) -> dict[int, Estimate]:
    """Trial id -> its objective as the search sees it, estimated over all items of the search: comparable across generations.

    pool: all items of the search; last: the number of the last generation. The items' ease is that of all candidates
    scored on a generation's whole subset. Empty where the objective is no mean of items.
    """
    if not objective.is_mean_of_items:
        return {}
    ease, own = ItemMeans(), {}
    wanted = {t.id for t in trials}
    seen: set[tuple[str, int]] = set()  # equal recipes of a generation share their scores
    for trial in store.trials():
        whole = trial.score is not None and trial.dropped is None
        counted = whole and trial.origin != "mean" and trial.generation <= last and (trial.recipe_id, trial.generation) not in seen
        if counted or (whole and trial.id in wanted):
            items = objective.seen(store.trial_items(trial))
            if counted:
                seen.add((trial.recipe_id, trial.generation))
                ease.add(items)
            if trial.id in wanted:
                own[trial.id] = items
    shares = objective.seen_shares
    found = {i: control_variate(items, ease, pool, shares) for i, items in own.items()}
    return {i: e for i, e in found.items() if math.isfinite(e.mean)}


def leaders(trials: Iterable[Trial], known: Mapping[int, Estimate], after: float, last: int) -> list[Trial]:
    """Candidates of the generations in (after, last] that were scored in full, one a recipe, the best first.

    Those that keep what `keep` asks come first; then the estimate decides, or the score where there are none.
    """
    late = [t for t in trials if t.score is not None and t.dropped is None and t.origin in ("sampled", "injected") and after < t.generation <= last]

    def worth(t: Trial) -> float:
        return known[t.id].mean if known else t.score if t.score is not None else -math.inf

    ranked = sorted((t for t in late if not known or t.id in known), key=lambda t: (t.violation, -worth(t), t.id))
    return list({t.recipe_id: t for t in reversed(ranked)}.values())[::-1]


def elect(objective: Objective, standing: Sequence[Trial], validated: Mapping[str, Scored], floors: Mapping[str, float]) -> list[Trial]:
    """Those that stand for election, the best on validation first; one that breaks `keep` there comes after all that do not."""

    def key(t: Trial) -> tuple[float, float]:
        found = validated[t.recipe_id]
        return objective.violation(found.evaluation.metrics, floors), -(found.score or 0.0)

    return sorted(standing, key=key)


def against(objective: Objective, winner: Scored, other: Scored) -> Estimate | None:
    """The winner's lead over another on the same items, paired; None where the objective or an error does not tell it."""
    if not objective.is_mean_of_items:
        return None
    lead = paired(winner.evaluation.items, other.evaluation.items, objective.shares())
    return lead if math.isfinite(lead.error) else None


def p_values(objective: Objective, winner: str, others: Sequence[str], validated: Mapping[str, Scored]) -> dict[str, float]:
    """Recipe -> two-sided p-value that the winner is no better and no worse on validation, paired, Holm over all others.

    The winner was chosen on these items, so that they flatter it: a small value is needed to believe in a difference, and
    the test items decide what is reported.
    """
    distinct = [r for r in dict.fromkeys(others) if r != winner and r in validated]
    leads = [(r, against(objective, validated[winner], validated[r])) for r in distinct]
    told = [(r, lead.p_value()) for r, lead in leads if lead is not None]
    return dict(zip([r for r, _ in told], holm([p for _, p in told]), strict=True))


def headline(objective: Objective, scored: Scored) -> Estimate | None:
    """The reported objective with its error; by the delta method where it is a geometric mean or the worst task.

    The worst task's error leaves out that another could be the worst. None for metrics that are no means of items.
    """
    e = scored.evaluation
    if scored.reported is None or not all(t.mean for t in objective.terms):
        return None
    shares = objective.shares(e.metrics)
    size = math.fsum(abs(s) for s in shares.values())
    if size == 0:
        return None
    found = stratified(e.items, shares)
    return replace(found, mean=scored.reported, error=found.error * size) if math.isfinite(found.error) else None


def interval(estimate: Estimate) -> dict[str, Any]:
    """A test score's error and 95 % interval as keys of a row."""
    return {"test_error": estimate.error, "test_interval": list(estimate.interval(0.95))}


def selection_luck(search: Estimate | None, test: Estimate | None) -> dict[str, float]:
    """Search less test score, and its error, as keys of a row: what a score owes to having been selected by it."""
    if search is None or test is None:
        return {}
    found = luck(search, test)
    return {"luck": found.mean, "luck_error": found.error}


def retention(objective: Objective, winner: Scored, parents: Sequence[tuple[str, Scored]]) -> list[dict[str, Any]]:
    """By task and parent the winner's lead on the test items, paired; `lost` where it falls by more than `ALARM` errors.

    parents: (name, scored on the same items). Higher is better. Left out are tasks whose metric is no mean of items.
    """
    rows: list[dict[str, Any]] = []
    for term in objective.terms:
        for name, parent in parents if term.mean else ():
            lead = paired(winner.evaluation.items, parent.evaluation.items, {leaf: term.sign * share for leaf, share in term.strata})
            if math.isfinite(lead.error):
                lost = lead.mean < -ALARM * lead.error
                rows.append({"task": term.task, "parent": name, "difference": lead.mean, "error": lead.error, "lost": lost})
    return rows


def item_means(objective: Objective, task: str, scores: Sequence[ItemScore], items: Items) -> dict[str, float]:
    """Metrics of a task's strata over some of the items that a model was scored on. Of a task whose metric is their mean."""
    term = next(t for t in objective.terms if t.task == task)
    known = {(s.task, s.item): s.value for s in scores}
    return {leaf: math.fsum(known[leaf, i] for i in items[leaf]) / len(items[leaf]) for leaf, _ in term.strata}
