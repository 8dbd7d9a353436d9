"""Lineage: the candidates that the best one was recombined from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.store import Trial

_NODES = 60
_STEPS = 8  # generations back
_PARENTS = 5  # of a candidate, the best ones


def lineage(snapshot: Snapshot, trial: Trial | None = None) -> Panel:
    """Makes the panel of a candidate's lineage.

    Args:
        snapshot: Of the study.
        trial: The candidate; None for the best.

    Returns:
        Its ancestors over 8 generations, of each candidate the 5 best ones.
    """
    caption = (
        f"Where the best candidate comes from: those that the optimizer recombined, {_STEPS} steps back, of "
        f"each the {_PARENTS} best. An optimizer that recombines nothing, as random search, has none."
    )
    trial = trial or snapshot.best
    if trial is None:
        return Panel("lineage", "Lineage", caption, note="No candidate has been scored yet.")
    nodes, links = _ancestors(trial, snapshot.by_id)
    name = snapshot.name(trial)
    if len(nodes) < 2:
        return Panel("lineage", "Lineage", caption, note=f"{name} was recombined from no other candidate.")
    chart: dict[str, Any] = {
        "root": trial.id,
        "nodes": [
            [t.id, snapshot.name(t), t.generation, rounded(t.reported), step] for t, step in nodes.values()
        ],
        "links": links,
    }
    columns = (
        Column("candidate", "candidate"),
        Column("label"),
        Column("generation", "count"),
        Column("objective", "score"),
        Column("recombined from"),
    )
    rows = tuple(
        (t.id, t.label or "", t.generation, t.reported, _numbers(t.parents)) for t, _ in nodes.values()
    )
    return Panel("lineage", "Lineage", caption, chart, (Table(f"Ancestors of {name}", columns, rows),))


def _ancestors(
    trial: Trial, by_id: Mapping[int, Trial]
) -> tuple[dict[int, tuple[Trial, int]], list[list[int]]]:
    """(id -> trial and its distance, [child, parent] pairs)."""
    nodes, links, layer = {trial.id: (trial, 0)}, [], [trial]
    for step in range(1, _STEPS + 1):
        following: list[Trial] = []
        for child in layer:
            parents = [by_id[number] for number in child.parents if number in by_id]
            parents.sort(key=lambda t: (t.score is None, -(t.score or 0.0)))
            for parent in parents[:_PARENTS]:
                if parent.id not in nodes:
                    if len(nodes) >= _NODES:
                        continue
                    nodes[parent.id] = (parent, step)
                    following.append(parent)
                links.append([child.id, parent.id])
        layer = following
    return nodes, links


def _numbers(ids: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return f"{shown} and {len(ids) - 10} more" if len(ids) > 10 else shown
