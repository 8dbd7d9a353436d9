"""What is said of a search that is over: estimates, finalists, tests, the headline, bias, retention.

Plain rows from item scores; nothing is scored here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evomerge.evaluation import Items, ItemScore, Objective
from evomerge.evaluation.estimates import (
    Estimate,
    ItemMeans,
    control_variate,
    holm,
    objective_estimate,
    paired,
    selection_bias,
)
from evomerge.evaluation.flat_tasks import is_floor
from evomerge.evaluation.intervals import lead_interval, score_interval
from evomerge.store import Scored, Store, Trial

_Turns = tuple[int, ...]  # by task of the pool, how often its items had been gone through
ALARM = 1.96
"""Standard errors by which a skill has to fall to be called lost: 2.5 % a comparison, not corrected for their
number, since a false alarm costs a look and a missed loss is not seen at all."""


def estimates(
    store: Store,
    objective: Objective,
    pool: Items,
    trials: Sequence[Trial],
    last: int,
    epochs: Callable[[Trial], Mapping[str, int]],
) -> dict[int, Estimate]:
    """Estimates candidates' objectives over all items of the search, comparable across generations.

    An item's ease is the mean over generations of its candidates' values less their own means. The trial's
    own epoch is left out: there the item was scored beside the same other items, which says nothing of how
    easy they are together, and would make the error look smaller than it is. In a first epoch the estimate is
    the plain mean.

    Args:
        store: The study's store.
        objective: What the search maximizes.
        pool: All items of the search.
        trials: The candidates to estimate.
        last: Number of the last generation.
        epochs: Trial -> task -> how often all items of the task had been used before the trial's generation
            took its own.

    Returns:
        Trial id -> the objective as the search sees it, with its error. Empty where the objective is no mean
        of items.
    """
    if not objective.is_mean_of_items:
        return {}
    tasks, wanted = tuple(pool), {t.id for t in trials}
    own: dict[int, tuple[_Turns, tuple[ItemScore, ...]]] = {}
    # by generation: (task, item) -> [sum, count]
    sums: dict[tuple[int, _Turns], dict[tuple[str, str], list[float]]] = {}
    for trial in store.trials():
        if trial.score is None or trial.generation > last:
            continue
        items = objective.search_items(store.scored(trial).evaluation.items)
        turns = tuple(epochs(trial)[task] for task in tasks)
        if trial.id in wanted:
            own[trial.id] = turns, items
        if trial.generation > 0 and trial.origin not in ("mean", "learned"):
            found = sums.setdefault((trial.generation, turns), {})
            level = _levels(items)
            for s in items:
                pair = found.setdefault((s.task, s.item), [0.0, 0])
                pair[0] += s.value - level[s.task]
                pair[1] += 1
    averages = [
        (turns, [ItemScore(*key, total / count) for key, (total, count) in found.items()])
        for (_, turns), found in sums.items()
    ]
    ease = {
        turns: _ease(averages, dict(zip(tasks, turns, strict=True)), tasks)
        for turns in dict.fromkeys(turns for turns, _ in own.values())
    }
    known = {
        i: control_variate(items, ease[turns], pool, objective.search_shares)
        for i, (turns, items) in own.items()
    }
    return {i: e for i, e in known.items() if math.isfinite(e.mean)}


def _levels(items: Iterable[ItemScore]) -> dict[str, float]:
    """Task -> mean value of its items."""
    values: dict[str, list[float]] = {}
    for s in items:
        values.setdefault(s.task, []).append(s.value)
    return {task: math.fsum(own) / len(own) for task, own in values.items()}


def _ease(
    averages: Sequence[tuple[_Turns, Sequence[ItemScore]]], apart: Mapping[str, int], tasks: Sequence[str]
) -> ItemMeans:
    """The items' ease from the generations of other epochs than these."""
    means = ItemMeans()
    for turns, items in averages:
        there = dict(zip(tasks, turns, strict=True))
        means.add([s for s in items if there[s.task] != apart[s.task]])
    return means


def leaders(
    trials: Iterable[Trial],
    known: Mapping[int, Estimate],
    after: float,
    last: int,
    price: Callable[[Trial], float] = lambda trial: 0.0,
) -> list[Trial]:
    """Ranks the candidates of the generations in (after, last] that no race dropped, one a recipe.

    Those that keep what `keep` asks come first; then the estimate decides, or the score where there are none.

    Args:
        trials: All trials of a search.
        known: Trial id -> its estimate; empty where there are none.
        after: Generation after which candidates count.
        last: The last generation whose candidates count.
        price: What a candidate's size costs, which its estimate does not hold.

    Returns:
        The candidates, the best first.
    """
    late = [
        t
        for t in trials
        if t.score is not None
        and t.dropped is None
        and t.origin in ("sampled", "injected")
        and after < t.generation <= last
    ]

    def worth(t: Trial) -> float:
        return known[t.id].mean - price(t) if known else t.score if t.score is not None else -math.inf

    ranked = sorted(
        (t for t in late if not known or t.id in known), key=lambda t: (t.violation, -worth(t), t.id)
    )
    return list({t.recipe_id: t for t in reversed(ranked)}.values())[::-1]


def elect(
    objective: Objective,
    standing: Sequence[Trial],
    validated: Mapping[str, Scored],
    floors: Mapping[str, float],
) -> list[Trial]:
    """Ranks the finalists by their validation scores.

    Args:
        objective: What the search maximizes.
        standing: The finalists.
        validated: Recipe id -> its validation.
        floors: Task -> the least metric that `keep` asks.

    Returns:
        The finalists, the best first; one that breaks `keep` comes after all that do not.
    """

    def key(t: Trial) -> tuple[float, float]:
        found = validated[t.recipe_id]
        return objective.violation(found.evaluation.metrics, floors), -(found.score or 0.0)

    return sorted(standing, key=key)


def against(objective: Objective, winner: Scored, other: Scored) -> Estimate | None:
    """Estimates the winner's lead over another on the same items, paired.

    Args:
        objective: What the search maximizes.
        winner: The winner's scores.
        other: The other's scores on the same items.

    Returns:
        The lead with its error; None where the objective is no mean of items or the error is unknown.
    """
    if not objective.is_mean_of_items:
        return None
    found = paired(winner.evaluation.items, other.evaluation.items, objective.shares())
    return found if math.isfinite(found.error) else None


def p_values(
    objective: Objective, winner: str, others: Sequence[str], validated: Mapping[str, Scored]
) -> dict[str, float]:
    """Tests the winner against others on the validation items: paired, two-sided, Holm over all others.

    The winner was chosen on these items, so that they are biased in its favour: a small value is needed to
    believe in a difference, and the test items decide what is reported.

    Args:
        objective: What the search maximizes.
        winner: Recipe id of the winner.
        others: Recipe ids of the others.
        validated: Recipe id -> its validation.

    Returns:
        Recipe id -> p-value, of those that a test is defined for.
    """
    distinct = [r for r in dict.fromkeys(others) if r != winner and r in validated]
    leads = [(r, against(objective, validated[winner], validated[r])) for r in distinct]
    told = [(r, found.p_value()) for r, found in leads if found is not None]
    return dict(zip([r for r, _ in told], holm([p for _, p in told]), strict=True))


def headline(objective: Objective, scored: Scored) -> Estimate | None:
    """Estimates the reported objective with its error.

    By the delta method where it is a geometric mean or the worst task; the worst task's error leaves out that
    another could be the worst.

    Args:
        objective: What the search maximizes.
        scored: A candidate's scores.

    Returns:
        The objective with its error; None for metrics that are no means of items.
    """
    return objective_estimate(objective, scored.evaluation, scored.reported)


def row(
    trial: Trial,
    known: Mapping[int, Estimate],
    validated: Mapping[str, Scored],
    tested: Mapping[str, Scored],
    p: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Makes a candidate's line of the outcome.

    Args:
        trial: The candidate.
        known: Trial id -> its estimate.
        validated: Recipe id -> its validation.
        tested: Recipe id -> its test.
        p: Recipe id -> p-value of the winner against it.

    Returns:
        Its scores by role, its estimate and p-value where there are any, its error if it failed.
    """
    out: dict[str, Any] = {
        "id": trial.id,
        "origin": trial.origin,
        "label": trial.label,
        "recipe": trial.recipe_id,
        "search": trial.reported,
    }
    if trial.id in known:
        out |= {"estimate": known[trial.id].mean, "estimate_error": known[trial.id].error}
    for role, scored in (("validation", validated), ("test", tested)):
        if trial.recipe_id in scored:
            found = scored[trial.recipe_id]
            out |= {role: found.reported, f"{role}_metrics": dict(found.evaluation.metrics)}
            if found.evaluation.error:
                out["error"] = found.evaluation.error
    if p and trial.recipe_id in p:
        out["p"] = p[trial.recipe_id]
    if trial.error:
        out["error"] = trial.error
    return out


def lead(estimate: Estimate | None, objective: Objective, winner: Scored, other: Scored) -> dict[str, Any]:
    """Writes a lead as keys of a row.

    Args:
        estimate: The winner's lead over another, as `against` gives it.
        objective: What the search maximizes.
        winner: The winner's scores.
        other: The other's, on the same items.

    Returns:
        The lead, its error and 95 % interval, see `evaluation.intervals`; empty without an estimate.
    """
    if estimate is None:
        return {}
    found = (estimate.mean, estimate.mean)
    if winner.evaluation.recipe_id != other.evaluation.recipe_id:
        found = lead_interval(
            winner.evaluation.items, other.evaluation.items, objective.shares(), estimate.mean
        )
    return {"lead": estimate.mean, "lead_error": estimate.error, "lead_interval": list(found)}


def interval(estimate: Estimate | None, objective: Objective, scored: Scored) -> dict[str, Any]:
    """Writes a test score's error as keys of a row.

    Args:
        estimate: The test score, as `headline` gives it.
        objective: What the search maximizes.
        scored: The candidate's scores.

    Returns:
        Its error and 95 % interval, see `evaluation.intervals`; empty without an estimate.
    """
    if estimate is None:
        return {}
    shares = objective.shares(scored.evaluation.metrics)
    found = score_interval(scored.evaluation.items, shares, estimate.mean)
    return {"test_error": estimate.error, "test_interval": list(found)}


def selection_bias_columns(search: Estimate | None, test: Estimate | None) -> dict[str, float]:
    """Writes a selection bias as keys of a row.

    Args:
        search: The score on the search items, by which the candidate was selected.
        test: The score on the test items.

    Returns:
        Search less test score, and its error; empty where one of the two is missing.
    """
    if search is None or test is None:
        return {}
    found = selection_bias(search, test)
    return {"luck": found.mean, "luck_error": found.error}


def retention(
    objective: Objective, winner: Scored, parents: Sequence[tuple[str, Scored]]
) -> list[dict[str, Any]]:
    """Compares the winner with each parent on each task, paired, on the test items.

    Args:
        objective: What the search maximizes.
        winner: The winner's scores.
        parents: (name, scores on the same items) of each parent.

    Returns:
        A row per task and parent: the difference (higher is better), its error, and `lost` where the winner
        is worse by more than `ALARM` errors, and `floor`, the number of items, where the parent has none of
        them right: no skill to keep. Tasks whose metric is no mean of items have none.
    """
    rows: list[dict[str, Any]] = []
    for term in objective.terms:
        for name, parent in parents if term.mean else ():
            change = paired(
                winner.evaluation.items,
                parent.evaluation.items,
                {leaf: term.sign * share for leaf, share in term.strata},
            )
            if math.isfinite(change.error):
                lost = change.mean < -ALARM * change.error
                row = {
                    "task": term.task,
                    "parent": name,
                    "difference": change.mean,
                    "error": change.error,
                    "lost": lost,
                }
                if is_floor(parent.evaluation.items, term):
                    row["floor"] = change.n
                rows.append(row)
    return rows


def item_means(
    objective: Objective, task: str, scores: Sequence[ItemScore], items: Items
) -> dict[str, float]:
    """Averages some of the items that a model was scored on, of a task whose metric is their mean.

    Args:
        objective: What the search maximizes.
        task: A task or group of the objective.
        scores: The model's scores.
        items: The items that count, of every stratum of the task.

    Returns:
        Stratum -> mean over its items.
    """
    term = next(t for t in objective.terms if t.task == task)
    known = {(s.task, s.item): s.value for s in scores}
    return {
        leaf: math.fsum(known[leaf, i] for i in items[leaf]) / len(items[leaf]) for leaf, _ in term.strata
    }
