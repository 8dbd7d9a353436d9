"""How scores went over the search: every candidate, generations, parents and hand recipes as lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.store import Trial

_TABLE_ROWS = 40
_LINES = 6  # parents and hand recipes that are drawn as lines


def history(snapshot: Snapshot) -> Panel:
    """Makes the panel of the score history.

    Args:
        snapshot: Of the study.

    Returns:
        A point for each candidate, the best and the median of each generation, lines for parents and the best
        hand recipes.
    """
    caption = (
        "Each point is a candidate on its generation's search items; the lines are the generation's best and "
        "median. Dashed: parents and hand recipes."
    )
    rows = [_generation_row(number, trials) for number, trials in snapshot.generations.items()]
    if not rows:
        return Panel("history", "Score history", caption, note="No candidate has been stored yet.")
    points, failed = [], []
    for trial in snapshot.searched:
        if trial.reported is not None:
            points.append(
                [trial.id, rounded(trial.reported), trial.generation, int(trial.dropped is not None)]
            )
        elif trial.origin != "learned":
            failed.append([trial.id, trial.generation])
    finalists = [
        [trial.id, rounded(trial.reported), trial.label or ""]
        for trial in snapshot.trials
        if trial.origin == "mean" and trial.reported is not None
    ]
    chart = {
        "points": points,
        "failed": failed,
        "finalists": finalists,
        "generations": [[r[0], r[7], r[8], rounded(r[4]), rounded(r[5])] for r in rows],
        "references": _references(snapshot),
        "best": None if snapshot.best is None else snapshot.best.id,
    }
    columns = (
        Column("generation", "count"),
        Column("stage", "count"),
        Column("candidates", "count"),
        Column("failed", "count"),
        Column("best", "score"),
        Column("median", "score"),
        Column("dropped", "count"),
    )
    shown = rows[-_TABLE_ROWS:]
    what = "Generations" if len(shown) == len(rows) else f"The last {len(shown)} of {len(rows)} generations"
    table = Table(what, columns, tuple(tuple(row[:7]) for row in reversed(shown)))
    return Panel("history", "Score history", caption, chart, (table,))


def _generation_row(number: int, trials: Sequence[Trial]) -> list[Any]:
    """generation, stage, candidates, failed, best, median, dropped, first id, last id."""
    scores = [trial.reported for trial in trials if trial.reported is not None]
    in_full = [t.reported for t in trials if t.reported is not None and t.dropped is None]
    failed = sum(trial.score is None and trial.origin != "learned" for trial in trials)
    return [
        number,
        trials[0].stage + 1,
        len(trials),
        failed,
        max(in_full, default=None),
        statistics.median(scores) if scores else None,
        sum(trial.dropped is not None for trial in trials),
        min(trial.id for trial in trials),
        max(trial.id for trial in trials),
    ]


def _references(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Parents, the uniform merge and the best hand recipe, each with its score on search items."""
    scored = [trial for trial in snapshot.references if trial.reported is not None]
    hand = [trial for trial in scored if trial.origin == "hand"]
    uniform = [trial for trial in hand if trial.label == "uniform average"]
    best_hand = sorted(hand, key=lambda trial: -(trial.reported or 0.0))[:1]
    parents = sorted(snapshot.parents, key=lambda trial: -(trial.reported or 0.0))
    chosen = {trial.id: trial for trial in (*best_hand, *uniform, *parents) if trial.reported is not None}
    return [
        {"name": snapshot.name(trial), "origin": trial.origin, "score": rounded(trial.reported)}
        for trial in list(chosen.values())[:_LINES]
    ]
