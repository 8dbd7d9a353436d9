"""Tasks: the winner on search and held-out items beside the best parent, alarms, trade-offs between tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.reports.summary import front
from evomerge.store import Trial

_POINTS = 3000  # of the trade-off's chart


def tasks(snapshot: Snapshot) -> Panel:
    """Makes the panel of tasks.

    Args:
        snapshot: Of the study.

    Returns:
        For each task the best candidate on search, validation and test items, the best parent on the same
        role, and whether a parent's skill is lost.
    """
    caption = (
        "The best candidate on the items it was searched on and on items it never saw, beside the best "
        "parent of each task. An alarm: a parent was better by more than chance."
    )
    best = snapshot.best
    if best is None or not best.metrics:
        return Panel("tasks", "Tasks", caption, note="No candidate has been scored yet.")
    summary = snapshot.summary
    row: Mapping[str, Any] = summary["best"]
    role = next((role for role in ("test", "validation") if f"{role}_metrics" in row), None)
    held_out: Mapping[str, float] = row.get(f"{role}_metrics", {}) if role else {}
    parents = _parents(snapshot, role)
    lost = {r["task"]: r for r in sorted(summary["retention"], key=lambda r: -r["difference"]) if r["lost"]}
    rows = []
    for task in snapshot.tasks:
        sign = _sign(snapshot, task)
        scored = {name: metrics[task] for name, metrics in parents.items() if task in metrics}
        name = max(scored, key=lambda parent: sign * scored[parent], default=None)
        parent = None if name is None else scored[name]
        value = held_out.get(task) if role else best.metrics.get(task)
        difference = None if value is None or parent is None else value - parent
        alarm = ""
        if task in lost:
            alarm = (
                f"lost to {lost[task]['parent']}: {lost[task]['difference']:+.3f} ± {lost[task]['error']:.3f}"
            )
        rows.append((task, best.metrics.get(task), held_out.get(task), parent, name, difference, alarm))
    chart = {
        "tasks": [r[0] for r in rows],
        "search": [rounded(r[1]) for r in rows],
        "held_out": [rounded(r[2]) for r in rows],
        "parent": [rounded(r[3]) for r in rows],
        "parents": [r[4] for r in rows],
        "alarms": [r[6] for r in rows],
        "role": role or "",
    }
    columns = (
        Column("task"),
        Column("search", "score"),
        Column(f"held out ({role})" if role else "held out", "score"),
        Column("best parent", "score"),
        Column("which"),
        Column("difference", "signed"),
        Column("alarm"),
    )
    alarms = tuple(number for number, r in enumerate(rows) if r[6])
    what = f"{snapshot.name(best)} by task; the parent on {role or 'search'} items"
    table = Table(what, columns, tuple(rows), alarms=alarms)
    return Panel("tasks", "Tasks", caption, chart, (table,))


def _sign(snapshot: Snapshot, task: str) -> int:
    facts = snapshot.study.facts.terms.get(task)
    return 1 if facts is None else facts.sign


def _parents(snapshot: Snapshot, role: str | None) -> dict[str, Mapping[str, float]]:
    """Parent -> its metrics on items of a role, of the search where it is None."""
    if role is None:
        return {str(trial.label): trial.metrics for trial in snapshot.parents}
    return {
        str(row["label"]): row.get(f"{role}_metrics", {})
        for row in snapshot.summary["references"]
        if row["origin"] == "parent"
    }


def trade_offs(snapshot: Snapshot) -> Panel:
    """Makes the panel of trade-offs between tasks.

    Args:
        snapshot: Of the study.

    Returns:
        Every candidate by its tasks' metrics, and the Pareto front as a table.
    """
    title = "Trade-off between tasks"
    caption = (
        "Each point is a candidate by two of its tasks, on search items; on the front are those that no "
        "other equals or betters in every task."
    )
    data = front(snapshot.store)
    if len(data["tasks"]) < 2:
        return Panel("tradeoff", title, caption, note="There is one task, so nothing is traded.")
    trials = [t for t in snapshot.trials if t.metrics and t.reported is not None and t.dropped is None]
    if not trials:
        return Panel("tradeoff", title, caption, note="No candidate has been scored yet.")
    on_front = {row["id"] for row in data["candidates"]}
    chosen = [t for t in trials if t.generation == 0 or t.id in on_front]
    chosen += _thinned([t for t in trials if t.generation > 0 and t.id not in on_front])
    chart = {
        "tasks": data["tasks"],
        "items": data["items"],
        "points": [
            [
                trial.id,
                [rounded(trial.metrics.get(task)) for task in data["tasks"]],
                rounded(trial.reported),
                trial.id in on_front,
                trial.label if trial.origin in ("parent", "hand") else None,
                trial.origin,
            ]
            for trial in chosen
        ],
        "best": None if snapshot.best is None else snapshot.best.id,
    }
    columns = (
        Column("candidate", "candidate"),
        Column("origin"),
        Column("objective", "score"),
        *(Column(task, "score") for task in data["tasks"]),
    )
    rows = tuple(
        (
            row["id"],
            row["label"] or row["origin"],
            row["objective"],
            *(row["metrics"].get(task) for task in data["tasks"]),
        )
        for row in data["candidates"]
    )
    table = Table(f"The Pareto front, on items of {data['items']}", columns, rows)
    return Panel("tradeoff", title, caption, chart, (table,) if rows else ())


def _thinned(trials: Sequence[Trial]) -> list[Trial]:
    """Every n-th of too many points."""
    step = max(1, -(-len(trials) // _POINTS))
    return list(trials[::step])
