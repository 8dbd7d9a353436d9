"""The head of the page: state, verdict in a sentence, best score with interval, leads, time left, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from evomerge.evaluation.intervals import lead_interval, score_interval
from evomerge.reports.panels.panel import Overview, Tile, duration
from evomerge.reports.panels.snapshot import SEARCHED, Snapshot
from evomerge.reports.summary import lost_skills, test_item_uses
from evomerge.store import Trial

_RECENT = 200  # attempts that the time left is told from
_STALE = 20  # times the usual time of an attempt without a result, after which a search is called silent


def overview(snapshot: Snapshot) -> Overview:
    """Makes the head of a study's page.

    Args:
        snapshot: Of the study.

    Returns:
        The head.
    """
    summary = snapshot.summary
    tiles = [_best_tile(snapshot), _parent_tile(snapshot), _held_out_tile(snapshot)]
    tiles += [_progress_tile(snapshot), _cost_tile(snapshot), _failure_tile(summary)]
    return Overview(
        study=snapshot.study.name,
        state=summary["state"],
        verdict=verdict(snapshot),
        tiles=tuple(tile for tile in tiles if tile is not None),
        warnings=tuple(_warnings(snapshot)),
        progress=_progress(snapshot),
        facts=tuple(_facts(snapshot)),
    )


def verdict(snapshot: Snapshot) -> str:
    """Says in one sentence what a search has found, or how far it has come.

    Args:
        snapshot: Of the study.

    Returns:
        The sentence.
    """
    summary, best = snapshot.summary, snapshot.best
    if summary["state"] != "done":
        return _so_far(snapshot)
    if summary["alike"]:
        return f"There is no winner: {summary['alike']}."
    row = summary["best"]
    if best is None or row.get("test") is None:
        return f"The winner could not be scored on the test items ({row.get('error') or 'no score'})."
    reference = max(
        (r for r in summary["references"] if r.get("test") is not None),
        key=lambda r: float(r["test"]),
        default=None,
    )
    score = f"{row['test']:.3f}{_between(row.get('test_interval'))} on held-out test items"
    label = f" ({row['label']})" if row["label"] else ""
    start = f"Candidate {row['id']}{label} scores {score}"
    if reference is None:
        return f"{start}."
    kind = "parent" if reference["origin"] == "parent" else "hand recipe"
    if reference["recipe"] == row["recipe"]:
        return (
            f"The search found nothing better than the {kind} '{reference['label']}', which scores {score}."
        )
    lead = row["test"] - reference["test"]
    interval = reference.get("lead_interval")
    other = f"the best {kind} ({reference['label']}, {reference['test']:.3f})"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return f"{start}, no clear difference to {other}: {lead:+.3f}{_between(interval, '+.3f')}."
    direction = "ahead of" if lead > 0 else "behind"
    return f"{start}, {abs(lead):.3f}{_between(_absolute(interval, lead))} {direction} {other}."


def _so_far(snapshot: Snapshot) -> str:
    summary, best = snapshot.summary, snapshot.best
    states = {
        "running": "The search is running",
        "interrupted": "The search is not running: its process is gone",
        "paused": "The search is paused",
        "failed": "The search has failed",
    }
    start = states.get(summary["state"], f"The search is {summary['state']}")
    if best is None or best.reported is None:
        return f"{start}; nothing has been scored yet."
    parent = snapshot.best_parent()
    name = f"'{best.label}'" if best.generation == 0 else f"candidate {best.id}"
    text = f"{start}; the best so far is {name} with {best.reported:.3f} on search items"
    if parent is None or parent.reported is None or parent.id == best.id:
        return f"{text}."
    return f"{text}, beside {parent.reported:.3f} of the best parent ({parent.label})."


def _between(interval: Sequence[float] | None, form: str = ".3f") -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" (95 %: {interval[0]:{form}} to {interval[1]:{form}})"


def _absolute(interval: Sequence[float] | None, lead: float) -> Sequence[float] | None:
    """The interval of the lead's size."""
    if interval is None or lead >= 0:
        return interval
    return -interval[1], -interval[0]


def search_interval(snapshot: Snapshot, trial: Trial) -> tuple[float, float] | None:
    """The 95 % interval of a trial's own score, over the items that it was scored on.

    Args:
        snapshot: Of the study.
        trial: A trial with a score.

    Returns:
        (low, high); None where the objective is no mean of items, or is not known.
    """
    objective = snapshot.objective
    if objective is None or not objective.is_mean_of_items or trial.reported is None:
        return None
    items = snapshot.store.scored(trial).evaluation.items
    interval = score_interval(items, objective.shares(), trial.reported)
    return interval if all(map(math.isfinite, interval)) else None


def _best_tile(snapshot: Snapshot) -> Tile | None:
    best, row = snapshot.best, snapshot.summary["best"]
    if best is None or row is None:
        return Tile("best", "–", "nothing scored yet")
    role = next((role for role in ("test", "validation", "search") if row.get(role) is not None), None)
    if role is None:
        return Tile("best", "–", "could not be scored")
    interval = row.get("test_interval") if role == "test" else None
    if role == "search":
        interval = search_interval(snapshot, best)
    value = f"{row[role]:.3f}"
    if interval is not None:
        value += f" ± {(interval[1] - interval[0]) / 2:.3f}"
    return Tile(f"best, {role} items", value, f"{snapshot.name(best)}, generation {best.generation}")


def _parent_tile(snapshot: Snapshot) -> Tile | None:
    """The lead over the best parent."""
    best, row = snapshot.best, snapshot.summary["best"]
    if best is None or row is None:
        return None
    if row.get("test") is not None:
        tested = [
            r for r in snapshot.summary["references"] if r["origin"] == "parent" and r.get("test") is not None
        ]
        if tested:
            other = max(tested, key=lambda r: float(r["test"]))
            lead = row["test"] - other["test"]
            return _lead_tile(lead, other.get("lead_interval"), str(other["label"]))
        return None
    parent = snapshot.best_parent()
    if parent is None or parent.id == best.id or best.reported is None or parent.reported is None:
        return None
    paired = _paired_lead(snapshot, best, parent)
    if paired is not None:
        return _lead_tile(*paired, str(parent.label))
    lead = best.reported - parent.reported
    return Tile("over the best parent", f"{lead:+.3f}", f"{parent.label}; on other items, not paired")


def _lead_tile(lead: float, interval: Sequence[float] | None, name: str) -> Tile:
    value = f"{lead:+.3f}"
    if interval is None:
        return Tile("over the best parent", value, name)
    value += f" ± {(interval[1] - interval[0]) / 2:.3f}"
    tone = "good" if interval[0] > 0 else "bad" if interval[1] < 0 else ""
    return Tile("over the best parent", value, name if tone else f"{name}; no clear difference", tone)


def _paired_lead(snapshot: Snapshot, best: Trial, parent: Trial) -> tuple[float, tuple[float, float]] | None:
    """The lead on the items that both were scored on as search items, with its interval."""
    objective = snapshot.objective
    if objective is None or not objective.is_mean_of_items:
        return None
    one, other = (
        {
            (score.task, score.item): score
            for role, scored in snapshot.store.evaluations(trial.recipe_id)
            if role == "search" and scored.evaluation.error is None
            for score in scored.evaluation.items
        }
        for trial in (best, parent)
    )
    shared = [key for key in one if key in other]
    shares = objective.shares()
    by_task: dict[str, list[float]] = {}
    for key in shared:
        by_task.setdefault(key[0], []).append(one[key].value - other[key].value)
    if any(task not in by_task for task, share in shares.items() if share):
        return None
    lead = math.fsum(share * statistics.fmean(by_task[task]) for task, share in shares.items() if share)
    interval = lead_interval([one[key] for key in shared], [other[key] for key in shared], shares, lead)
    return (lead, interval) if all(map(math.isfinite, interval)) else None


def _held_out_tile(snapshot: Snapshot) -> Tile | None:
    row = snapshot.summary["best"]
    if snapshot.summary["state"] != "done" or row is None or row.get("test") is None:
        return Tile("held out", "at the end", "test items judge the winner")
    retention = snapshot.summary["retention"]
    if not retention:
        return None
    lost = sorted({r["task"] for r in retention if r["lost"]})
    if not lost:
        return Tile("skills of parents", "kept", "no task fell by more than chance", "good")
    return Tile("skills of parents", f"{len(lost)} lost", ", ".join(lost), "bad")


def used_and_budget(snapshot: Snapshot) -> tuple[int, int | None]:
    """How many candidates a search has used, and how many it may have.

    Args:
        snapshot: Of the study.

    Returns:
        (used, budget); the budget is None in a study that did not store it.
    """
    used = sum(trial.origin in SEARCHED for trial in snapshot.trials)
    budgets = snapshot.study.facts.budgets
    return used, sum(budgets) if budgets else None


def _progress(snapshot: Snapshot) -> float | None:
    used, budget = used_and_budget(snapshot)
    if snapshot.summary["state"] == "done":
        return 1.0
    return None if not budget else min(1.0, used / budget)


def _progress_tile(snapshot: Snapshot) -> Tile:
    used, budget = used_and_budget(snapshot)
    value = f"{used:,}" if budget is None else f"{used:,} / {budget:,}"
    detail = f"{snapshot.summary['generations']} generations"
    left = time_left(snapshot)
    if left is not None:
        detail += f", about {duration(left)} left"
    return Tile("candidates", value, detail)


def time_left(snapshot: Snapshot) -> float | None:
    """Estimates the time that a running search still takes, by its latest attempts.

    Args:
        snapshot: Of the study.

    Returns:
        Seconds; None unless it runs, its budget is known and a generation is over.
    """
    used, budget = used_and_budget(snapshot)
    if snapshot.summary["state"] != "running" or budget is None or snapshot.summary["generations"] < 2:
        return None
    recent = [attempt for attempt in snapshot.attempts if attempt.cause in ("done", "failed")][-_RECENT:]
    ends = sorted(attempt.started + attempt.seconds for attempt in recent)
    gaps = [after - before for before, after in pairwise(ends)]
    if len(gaps) < 5:
        return None
    usual = 20 * statistics.median([attempt.seconds for attempt in recent]) + 60
    mean = statistics.fmean([min(gap, usual) for gap in gaps])  # a pause between two runs is no time at work
    return mean * max(0, budget - used)


def _cost_tile(snapshot: Snapshot) -> Tile:
    workers = snapshot.activity["workers"]
    busy = sum(worker["busy"] for worker in workers)
    driven = sum(run["seconds"] for run in snapshot.activity["runs"])
    devices = {worker["device"] for worker in workers}
    unit = "GPU time" if any(device.startswith("cuda") for device in devices) else "worker time"
    share = snapshot.activity["utilisation"]
    detail = f"{duration(driven)} on the clock, {len(workers)} worker{'s' if len(workers) != 1 else ''}"
    return Tile(unit, duration(busy), detail if share is None else f"{detail}, {100 * share:.0f} % busy")


def _failure_tile(summary: Mapping[str, Any]) -> Tile:
    dropped = f"{summary['dropped']} dropped by races" if summary["dropped"] else "none dropped"
    failed = summary["failed"]
    many = failed > 0.1 * max(1, summary["evaluations"])
    return Tile("failed", f"{failed:,}", dropped, "bad" if many else "")


def _warnings(snapshot: Snapshot) -> list[str]:
    summary, activity = snapshot.summary, snapshot.activity
    lines = [f"Without a signal before the search: {sentence}." for sentence in summary["flat"]]
    if summary["state"] == "interrupted":
        lines.append(f"No driver runs; go on with: evomerge resume {snapshot.study.name}")
    silent = _silence(snapshot)
    if silent is not None:
        lines.append(
            f"No result for {duration(silent)}, while an attempt usually takes far less: a worker may hang."
        )
    if activity["stop_requested"]:
        lines.append("A stop was asked for: the search ends when what is in flight has ended.")
    for end in activity["ended"]:
        lines.append(f"Stage {end['stage'] + 1}, island {end['island'] + 1} ended early: {end['cause']}.")
    if any(row["lost"] for row in summary["retention"]):
        lines.append(f"Retention: {lost_skills(summary['retention'])}.")
    for row in summary["agreements"]:
        if row["sentence"]:
            lines.append(f"Stage {row['stage']}: {row['sentence']}.")
    return lines


def _silence(snapshot: Snapshot) -> float | None:
    """Seconds without a result in a search that runs, where they are many."""
    if snapshot.summary["state"] != "running" or not snapshot.attempts:
        return None
    recent = snapshot.attempts[-_RECENT:]
    silent = snapshot.now - max(attempt.started + attempt.seconds for attempt in recent)
    usual = statistics.median([attempt.seconds for attempt in recent])
    return silent if silent > max(60.0, _STALE * usual) else None


def _facts(snapshot: Snapshot) -> list[tuple[str, str]]:
    facts, summary = snapshot.study.facts, snapshot.summary
    pairs = [("seed", str(snapshot.study.seed)), ("models", ", ".join(facts.parents))]
    scored = [f"{task} ({summary['metrics'].get(task, 'metric')})" for task in facts.tasks]
    pairs.append(("tasks", ", ".join(scored)))
    for role, counts in facts.items.items():
        pairs.append((f"{role} items", f"{sum(counts.values()):,}"))
    if facts.scoring.get("device"):
        pairs.append(("scored on", str(facts.scoring.get("card") or facts.scoring["device"])))
    best = summary["best"]
    if best is not None and "luck" in best:
        bias = f"{best['luck']:+.3f} ± {best['luck_error']:.3f} (search less test score of the winner)"
        pairs.append(("selection bias", bias))
    uses = test_item_uses(summary)
    if uses:
        pairs.append(("test items", uses.removeprefix("test items were ")))
    driver = snapshot.activity["driver"]
    if driver is not None and driver["alive"]:
        pairs.append(("driver", f"host {driver['host']}, pid {driver['pid']}"))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    return [*pairs, *([("made with", versions)] if versions else [])]
