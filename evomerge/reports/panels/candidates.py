"""Every candidate: a table to sort and filter, and the best ones as parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.reports.panels.coefficients import coefficients, mean_of_models
from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.store import Trial

PAGE = 25
"""Rows of a page of the table."""
_LINES = 150  # candidates that are drawn as parallel coordinates
_MODELS = 6  # models that have an axis
STATES = ("scored", "dropped", "failed", "no score")


@dataclass(frozen=True, slots=True)
class TableQuery:
    """What of the table is asked for, as the page's address has it.

    Attributes:
        sort: Label of a column, '-' before it for the largest first.
        origin: An origin, '' for all.
        state: One of `STATES`, '' for all.
        text: Part of a label, an error or a number; '' for all.
        page: Number of the page, from 1.
    """

    sort: str = "-objective"
    origin: str = ""
    state: str = ""
    text: str = ""
    page: int = 1

    @classmethod
    def of(cls, address: Mapping[str, str]) -> TableQuery:
        """Reads a query from the parameters of an address.

        Args:
            address: Name -> value; what cannot be read counts as left out.

        Returns:
            The query.
        """
        page = address.get("page", "1")
        number = int(page) if page.isascii() and page.isdigit() and len(page) < 7 else 1
        given = {name: address.get(name, "")[:100] for name in ("origin", "state", "text")}
        return cls(sort=address.get("sort", cls().sort)[:100], page=max(1, number), **given)


def candidates(snapshot: Snapshot, query: TableQuery | None = None) -> Panel:
    """Makes the panel of all candidates.

    Args:
        snapshot: Of the study.
        query: What to sort and filter by.

    Returns:
        The rows as columns of plain data, which the page sorts by itself, and the page that was asked for.
    """
    query = query or TableQuery()
    caption = "Sort by a heading, filter above; the address keeps both, so that a view can be sent to others."
    trials = snapshot.trials
    if not trials:
        return Panel("candidates", "Candidates", caption, note="No candidate has been stored yet.")
    columns = _columns(snapshot)
    rows = [_row(snapshot, trial) for trial in trials]
    selected = _selected(rows, [column.label for column in columns], query)
    first = (query.page - 1) * PAGE
    chart = {
        "columns": [{"label": column.label, "kind": column.kind} for column in columns],
        "rows": [[rounded(v) if isinstance(v, float) else v for v in row] for row in rows],
        "origins": sorted({trial.origin for trial in trials}),
        "states": [state for state in STATES if any(row[4] == state for row in rows)],
        "page": PAGE,
    }
    what = f"{len(selected):,} of {len(rows):,} candidates"
    table = Table(what, columns, tuple(map(tuple, selected[first : first + PAGE])))
    return Panel("candidates", "Candidates", caption, chart, (table,))


def _columns(snapshot: Snapshot) -> tuple[Column, ...]:
    layers = [Column("layers", "count")] if snapshot.has_several_depths else []
    return (
        Column("candidate", "candidate"),
        Column("label"),
        Column("generation", "count"),
        Column("origin"),
        Column("state"),
        Column("objective", "score"),
        *(Column(task, "score") for task in snapshot.tasks),
        *layers,
        Column("seconds", "score"),
        Column("error"),
    )


def _row(snapshot: Snapshot, trial: Trial) -> list[Any]:
    layers = [trial.costs.get("layers")] if snapshot.has_several_depths else []
    return [
        trial.id,
        trial.label or "",
        trial.generation,
        trial.origin,
        _state(trial),
        trial.reported,
        *(trial.metrics.get(task) for task in snapshot.tasks),
        *layers,
        sum(trial.seconds.values()) if trial.seconds else None,
        (trial.error or "")[:200],
    ]


def _state(trial: Trial) -> str:
    if trial.error is not None:
        return "failed"
    if trial.dropped is not None:
        return "dropped"
    return "no score" if trial.score is None else "scored"


def _selected(rows: Sequence[list[Any]], labels: Sequence[str], query: TableQuery) -> list[list[Any]]:
    """The rows that pass the filters, sorted; rows without a value come last."""
    text = query.text.lower()
    passed = [
        row
        for row in rows
        if query.origin in ("", row[3])
        and query.state in ("", row[4])
        and (not text or text in f"{row[0]} {row[1]} {row[-1]}".lower())
    ]
    label = query.sort.removeprefix("-")
    place = labels.index(label) if label in labels else labels.index("objective")
    with_value = [row for row in passed if row[place] not in (None, "")]
    without = [row for row in passed if row[place] in (None, "")]
    return sorted(with_value, key=lambda row: row[place], reverse=query.sort.startswith("-")) + without


def parallel(snapshot: Snapshot) -> Panel:
    """Makes the panel of parallel coordinates.

    Args:
        snapshot: Of the study.

    Returns:
        A line for each of the 150 best candidates: the mean coefficient of each model, the tasks' metrics and
        the objective.
    """
    title = "Coefficients and scores"
    caption = (
        f"A line is one of the {_LINES} best candidates: how much it takes of each model (mean over layers), "
        "what its tasks score, and the objective. Drag along an axis to select."
    )
    trials = snapshot.ranked[:_LINES]
    if not trials:
        return Panel("parallel", title, caption, note="No candidate has been scored yet.")
    cells = {trial.id: coefficients(snapshot.recipe(trial.recipe_id)) for trial in trials}
    every = dict.fromkeys(m for of in cells.values() for shares in of.values() for m in shares)
    models = tuple(every)[:_MODELS]
    lines = []
    for trial in trials:
        numbers = [*mean_of_models(cells[trial.id], models)]
        numbers += [trial.metrics.get(task, 0.0) for task in snapshot.tasks] + [trial.reported or 0.0]
        lines.append([*(rounded(number, 3) for number in numbers), trial.id])
    axes = [*(f"takes {model}" for model in models), *snapshot.tasks, "objective"]
    chart = {"axes": axes, "models": len(models), "lines": lines}
    columns = (Column("candidate", "candidate"), *(Column(axis, "score") for axis in axes))
    rows = tuple((line[-1], *line[:-1]) for line in lines[:10])
    return Panel("parallel", title, caption, chart, (Table("The ten best", columns, rows),))
