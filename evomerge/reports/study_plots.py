"""Pictures of a study from its panels' data: history, heat map, tasks, sensitivity, Pareto front, routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation.estimates import objective_estimate
from evomerge.reports import plots
from evomerge.reports.panels import Panel, Snapshot
from evomerge.reports.panels.beliefs import beliefs
from evomerge.reports.panels.history import history
from evomerge.reports.panels.routes import routes
from evomerge.reports.panels.tasks import tasks, trade_offs
from evomerge.store import Trial

_COLOURS = {"parent": "C2", "hand": "C1"}
_COLUMNS = 4  # curves beside one another


def draw(snapshot: Snapshot, kind: str, trial: Trial, file: Path) -> None:
    """Draws a picture of a study.

    Args:
        snapshot: Of the study.
        kind: A key of `PICTURES`.
        trial: The candidate whose sensitivity is drawn.
        file: Picture to write; see `evomerge.reports.plots.check`.

    Raises:
        StudyError: The study has nothing to draw yet, or nothing of that kind.
        SetupError: matplotlib is missing.
    """
    plots.check(file)
    make = plots.figure_class()
    PICTURES[kind](snapshot, trial, lambda size: make(figsize=size, layout="constrained"), file)


Figures = Callable[[tuple[float, float]], Any]
"""(width, height) in inches -> a figure of matplotlib."""


def _chart(panel: Panel | None, what: str) -> Mapping[str, Any]:
    """The chart of a panel; raises StudyError where there is none."""
    if panel is None or panel.chart is None:
        reason = panel.note if panel is not None and panel.note else f"the search has no {what}."
        raise StudyError(f"there is nothing to draw: {reason[0].lower()}{reason[1:].rstrip('.')}")
    return panel.chart


def _history(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    chart = _chart(history(snapshot), "history")
    figure = figure_of((8.0, 4.0))
    axes = figure.subplots()
    points = chart["points"]
    if points:
        axes.scatter(
            [p[0] for p in points], [p[1] for p in points], s=6, color="0.6", linewidths=0, label="candidate"
        )
    for column, label, style in ((3, "best of the generation", "-"), (4, "median", "--")):
        rows = [row for row in chart["generations"] if row[column] is not None]
        axes.plot([row[2] for row in rows], [row[column] for row in rows], style, color="C0", label=label)
    for line in chart["references"]:
        colour = _COLOURS.get(line["origin"], "0.3")
        axes.axhline(line["score"], color=colour, linestyle=":", linewidth=1)
        axes.annotate(
            line["name"], (1.0, line["score"]), xycoords=("axes fraction", "data"), color=colour, fontsize=7
        )
    axes.set_xlabel("candidate")
    axes.set_ylabel("objective on search items")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, axes, f"{snapshot.study.name}: score history", file)


def _heatmap(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    chart = _chart(beliefs(snapshot), "coefficients")
    models = chart["models"]
    mixed = [pair for pair in zip(chart["rows"], chart["values"][-1], strict=True) if pair[1][0] is not None]
    rows, values = [name for name, _ in mixed], [numbers for _, numbers in mixed]
    figure = figure_of((1.6 + 1.1 * len(models), 1.2 + 0.28 * len(rows)))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=chart["low"], vmax=chart["high"])
    axes.set_xticks(range(len(models)), models)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    if len(rows) <= 40:
        middle = (chart["low"] + chart["high"]) / 2
        for row, numbers in enumerate(values):
            for column, number in enumerate(numbers):
                colour = "black" if number > middle else "white"
                axes.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="coefficient")
    title = f"{snapshot.study.name}: coefficients, generation {chart['generations'][-1]}"
    _save(figure, axes, title, file)


def _tasks(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    chart = _chart(tasks(snapshot), "tasks")
    names = chart["tasks"]
    figure = figure_of((7.0, 1.5 + 0.55 * len(names)))
    axes = figure.subplots()
    series = [("search items", chart["search"], "0.7"), (chart["role"], chart["held_out"], "C0")]
    series.append(("best parent", chart["parent"], "C2"))
    for offset, (label, values, colour) in zip((-0.26, 0.0, 0.26), series, strict=True):
        if not label or all(value is None for value in values):
            continue
        places = [number + offset for number in range(len(names))]
        axes.barh(places, [value or 0.0 for value in values], height=0.24, color=colour, label=label)
    labels = [f"{name} (lost)" if alarm else name for name, alarm in zip(names, chart["alarms"], strict=True)]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("metric")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, axes, f"{snapshot.study.name}: the best by task", file)


def _pareto(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    chart = _chart(trade_offs(snapshot), "trade-off")
    first, second = chart["tasks"][:2]
    figure = figure_of((6.0, 5.0))
    axes = figure.subplots()
    points = [point for point in chart["points"] if None not in point[1][:2]]
    groups = (
        ("candidate", "0.7", [p for p in points if not p[3] and p[4] is None]),
        ("on the front of all tasks", "C3", [p for p in points if p[3]]),
        ("parent", "C2", [p for p in points if p[5] == "parent"]),
        ("hand recipe", "C1", [p for p in points if p[5] == "hand"]),
    )
    for label, colour, group in groups:
        if group:
            x, y = zip(*(point[1][:2] for point in group), strict=True)
            axes.scatter(x, y, s=14, color=colour, label=label, linewidths=0)
    axes.set_xlabel(first)
    axes.set_ylabel(second)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, axes, f"{snapshot.study.name}: trade-off on search items", file)


def _routes(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    chart = _chart(routes(snapshot), "routes of layers")
    models = chart["models"]
    nodes = {node["name"]: (node["place"], models.index(node["model"])) for node in chart["nodes"]}
    depth = 1 + max(place for place, _ in nodes.values())
    figure = figure_of((2.0 + 0.3 * depth, 1.0 + 0.6 * len(models)))
    axes = figure.subplots()
    for link in chart["links"]:
        (x1, y1), (x2, y2) = nodes[link["source"]], nodes[link["target"]]
        width = 8.0 * link["value"] / chart["routes"]
        axes.plot([x1, x2], [y1, y2], color="C0", alpha=0.6, linewidth=width, solid_capstyle="round")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("output layer")
    _save(figure, axes, f"{snapshot.study.name}: the {chart['routes']} best routes", file)


def _sensitivity(snapshot: Snapshot, trial: Trial, figure_of: Figures, file: Path) -> None:
    store = snapshot.store
    name = f"{snapshot.study.name}/{trial.id}"
    scans = store.usage.scans(trial.recipe_id)
    if not scans:
        raise StudyError(f"{name} has no scan to draw; make one: evomerge sensitivity {name}")
    role, items = scans[0]
    by_axis: dict[str, list[tuple[float, float, float]]] = {}
    for (axis, value), scored in store.sensitivity(trial.recipe_id, role, items).items():
        if scored.score is None:
            continue
        error = None
        if snapshot.objective is not None:
            error = objective_estimate(snapshot.objective, scored.evaluation, scored.score)
        by_axis.setdefault(axis, []).append((value, scored.score, 0.0 if error is None else error.error))
    columns = min(_COLUMNS, max(1, len(by_axis)))
    rows = -(-max(1, len(by_axis)) // columns)
    figure = figure_of((3.2 * columns, 2.4 * rows + 0.5))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(by_axis) :]:
        panel.set_visible(False)
    for (axis, points), panel in zip(by_axis.items(), panels.flat, strict=False):
        values, scores, errors = zip(*sorted(points), strict=True)
        panel.errorbar(values, scores, yerr=errors, marker="o", markersize=3, linewidth=1)
        panel.set_title(axis, fontsize=7)
        panel.tick_params(labelsize=7)
    figure.supxlabel("coefficient", fontsize=8)
    figure.supylabel(f"objective on {role} items ± its error", fontsize=8)
    figure.suptitle(f"{name}: sensitivity", fontsize=9)
    plots.save(figure, file)


def _save(figure: Any, axes: Any, title: str, file: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    plots.save(figure, file)


PICTURES: dict[str, Callable[[Snapshot, Trial, Figures, Path], None]] = {
    "history": _history,
    "heatmap": _heatmap,
    "tasks": _tasks,
    "sensitivity": _sensitivity,
    "pareto": _pareto,
    "routes": _routes,
}
"""Name -> what draws the picture."""
