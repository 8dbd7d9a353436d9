"""The head of the page: state, verdict in a sentence, best score with interval, leads, time left, cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.evaluation.intervals import score_interval
from evomerge.reports.panels.panel import Overview, Tile, duration
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.reports.summary import lost_skills, test_item_uses
from evomerge.reports.verdict import strongest_references
from evomerge.store import Trial

_NORMAL = 1.96  # standard errors of a 95 % interval
_RECENT = 200  # attempts that the usual time of one is taken from
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
        verdict=verdict_sentence(snapshot),
        tiles=tuple(tile for tile in tiles if tile is not None),
        warnings=tuple(_warnings(snapshot)),
        progress=_progress(snapshot),
        facts=tuple(_facts(snapshot)),
    )


def verdict_sentence(snapshot: Snapshot) -> str:
    """Says in one sentence what a search has found, or how far it has come.

    Args:
        snapshot: Of the study.

    Returns:
        The sentence.
    """
    sentence = str(snapshot.summary["verdict"]["sentence"])
    return f"{sentence}." if sentence else _so_far(snapshot)


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
        other = strongest_references(snapshot.summary)[0]
        if other is None or "lead" not in other:
            return None
        return _lead_tile(other["lead"], other.get("lead_interval"), str(other["label"]))
    figures = snapshot.summary["figures"]
    if figures["lead"] is None or figures["best"]["id"] != best.id:
        return None
    lead, error = figures["lead"], figures["lead_error"]
    interval = None if error is None else (lead - _NORMAL * error, lead + _NORMAL * error)
    return _lead_tile(lead, interval, str(figures["parent"]["label"]))


def _lead_tile(lead: float, interval: Sequence[float] | None, name: str) -> Tile:
    value = f"{lead:+.3f}"
    if interval is None:
        return Tile("over the best parent", value, name)
    value += f" ± {(interval[1] - interval[0]) / 2:.3f}"
    tone = "good" if interval[0] > 0 else "bad" if interval[1] < 0 else ""
    return Tile("over the best parent", value, name if tone else f"{name}; no clear difference", tone)


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


def _progress(snapshot: Snapshot) -> float | None:
    figures = snapshot.summary["figures"]
    if snapshot.summary["state"] == "done":
        return 1.0
    return None if not figures["budget"] else min(1.0, figures["evaluations"] / figures["budget"])


def _progress_tile(snapshot: Snapshot) -> Tile:
    figures = snapshot.summary["figures"]
    value = f"{figures['evaluations']:,}"
    if figures["budget"] is not None:
        value += f" / {figures['budget']:,}"
    parts = [f"{snapshot.summary['generations']} generations"]
    if snapshot.summary["state"] == "running" and figures["rate"] is not None:
        parts.append(f"{figures['rate']:,.0f} an hour")
        if figures["eta"]:
            of = f" of stage {figures['stage']}" if figures["stages"] > 1 else ""
            parts.append(f"about {duration(figures['eta'])} left{of}")
    return Tile("candidates", value, ", ".join(parts))


def _cost_tile(snapshot: Snapshot) -> Tile:
    figures = snapshot.summary["figures"]
    limits, hours = figures["limits"], figures["gpu_hours"]
    parts = [f"{duration(sum(run['seconds'] for run in snapshot.activity['runs']))} on the clock"]
    if limits["gpu_hours"] is not None:
        parts.insert(0, f"of {limits['gpu_hours']:g} h")
    if limits["price"]:
        most = "" if limits["cost"] is None else f" of {limits['cost']:g}"
        parts.append(f"cost {figures['cost']:.2f}{most}")
    share = snapshot.activity["utilisation"]
    workers = len(snapshot.activity["workers"])
    parts.append(f"{workers} worker{'s' if workers != 1 else ''}")
    if share is not None:
        parts.append(f"{100 * share:.0f} % busy")
    label = "GPU time" if figures["on_gpu"] else "worker time"
    return Tile(label, duration(3600 * hours), ", ".join(parts))


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
