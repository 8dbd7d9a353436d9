"""Health of the optimizer, from the genomes that it sampled: spread, movement and scores by generation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.store import Trial

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    """Numbers of genomes."""

_SOFT = ":logprob"
_TABLE_ROWS = 12
_COLLAPSED = 0.01  # of the first generation's spread


def optimizer(snapshot: Snapshot) -> Panel:
    """Makes the panel of the optimizer's health.

    Args:
        snapshot: Of the study.

    Returns:
        For each generation the spread of its genomes (root mean square of the genes' standard deviations, in
        units of genes), how far their mean moved since the generation before, the spread of scores, and of a
        learned step its loss.
    """
    title = "Optimizer"
    caption = (
        "Spread: how far apart the genomes of a generation lie; movement: how far their mean went since the "
        "one before. A search settles while both fall; a spread that falls at once, or scores that do not "
        "differ, mean that it has stopped looking. Of a learned stage: the loss of each step."
    )
    rows = _rows(snapshot)
    if not rows:
        return Panel("optimizer", title, caption, note="No generation with genomes is stored yet.")
    chart = {
        "generations": [row[0] for row in rows],
        "spread": [rounded(row[2], 5) for row in rows],
        "movement": [rounded(row[3], 5) for row in rows],
        "scores": [rounded(row[4], 5) for row in rows],
        "loss": [rounded(row[5], 5) for row in rows],
    }
    columns = (
        Column("generation", "count"),
        Column("genes", "count"),
        Column("spread", "score"),
        Column("movement", "score"),
        Column("s.d. of scores", "score"),
        Column("loss", "score"),
    )
    table = Table("The last generations", columns, tuple(map(tuple, rows[: -_TABLE_ROWS - 1 : -1])))
    return Panel("optimizer", title, caption, chart, (table,), _note(rows))


def _rows(snapshot: Snapshot) -> list[list[Any]]:
    """generation, genes, spread, movement, s.d. of scores, loss."""
    import numpy as np  # not needed by what else imports the panels

    rows: list[list[Any]] = []
    before: tuple[tuple[int, int], Matrix] | None = None  # (stage and genes, mean genome)
    for generation, trials in snapshot.generations.items():
        genomes = [trial.genome for trial in trials if trial.genome]
        length = len(genomes[0]) if genomes else 0
        genomes = [genome for genome in genomes if len(genome) == length]
        if not length:
            continue
        if trials[0].origin == "learned":
            rows.append([generation, length, None, None, None, _loss(trials)])
            before = None
            continue
        points = np.asarray(genomes)
        mean = points.mean(axis=0)
        kind = (trials[0].stage, length)
        moved = _distance(mean, before[1]) if before is not None and before[0] == kind else None
        before = kind, mean
        scores = [trial.score for trial in trials if trial.score is not None]
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        rows.append([generation, length, _spread(points), moved, deviation, None])
    return rows


def _spread(points: Matrix) -> float | None:
    """points: [candidates, genes]."""
    return math.sqrt(points.var(axis=0, ddof=1).mean()) if len(points) > 1 else None


def _distance(one: Matrix, other: Matrix) -> float:
    """Root mean square over the genes."""
    return math.sqrt(((one - other) ** 2).mean())


def _loss(trials: Sequence[Trial]) -> float | None:
    """Minus the mean log-probability of the right answers, over tasks."""
    metrics = trials[0].metrics
    values = [value for name, value in metrics.items() if name.endswith(_SOFT)]
    return -statistics.fmean(values) if values else None


def _note(rows: Sequence[Sequence[Any]]) -> str:
    spreads = [row[2] for row in rows if row[2] is not None]
    if len(spreads) > 2 and spreads[-1] < _COLLAPSED * spreads[0]:
        return f"The spread has fallen from {spreads[0]:.3g} to {spreads[-1]:.3g}: the search has settled."
    scores = [row[4] for row in rows if row[4] is not None]
    if len(scores) > 2 and not any(scores[-3:]):
        return "The candidates of the last generations score alike: there is nothing to select by."
    return ""
