"""Routes of layers: which model each layer comes from, over the best routes of a search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evomerge.recipes import Mix, Recipe
from evomerge.reports.panels.panel import Column, Panel, Table
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.reports.route_text import hops
from evomerge.reports.tally import rank
from evomerge.store import Trial

_ROUTES = 20  # the best, which the chart adds up
_LISTED = 8
_LOOKED_AT = 3  # candidates of a stage, to tell whether it searches routes


def routes(snapshot: Snapshot) -> Panel | None:
    """Makes the panel of routes.

    Args:
        snapshot: Of the study.

    Returns:
        For each output layer which model it comes from, over the 20 best routes, and the best ones in words;
        None for a search without routes.
    """
    best = [
        (trial, recipe)
        for trial in _distinct(snapshot)
        if (recipe := snapshot.recipe(trial.recipe_id)).is_route(snapshot.depths)
    ]
    if not best:
        return None
    caption = (
        f"From the input on the left to the output: the model that each layer comes from, over the {_ROUTES} "
        "best routes; the wider a band, the more routes go that way."
    )
    links: Counter[tuple[tuple[int, str], tuple[int, str]]] = Counter()
    for _, recipe in best:
        links.update(_links(recipe))
    nodes = dict.fromkeys(node for pair in links for node in pair)
    chart: dict[str, Any] = {
        "models": list(dict.fromkeys(model for _, model in nodes)),
        "nodes": [{"name": f"{place}:{model}", "place": place, "model": model} for place, model in nodes],
        "links": [
            {"source": f"{a[0]}:{a[1]}", "target": f"{b[0]}:{b[1]}", "value": count}
            for (a, b), count in links.items()
        ],
        "routes": len(best),
    }
    columns = (
        Column("candidate", "candidate"),
        Column("objective", "score"),
        Column("layers", "count"),
        Column("route"),
    )
    rows = tuple(
        (trial.id, trial.reported, len(recipe.layers), hops(recipe)) for trial, recipe in best[:_LISTED]
    )
    table = Table("The best routes; a range is of the model's own layers", columns, rows)
    return Panel("routes", "Routes", caption, chart, (table,))


def _distinct(snapshot: Snapshot) -> Sequence[Trial]:
    """The best candidates of the stages that search routes, each recipe once."""
    by_stage: dict[int, list[Trial]] = {}
    for trial in snapshot.ranked:
        by_stage.setdefault(trial.stage, []).append(trial)
    trials: dict[str, Trial] = {}
    for ranked in by_stage.values():
        if any(snapshot.recipe(t.recipe_id).is_route(snapshot.depths) for t in ranked[:_LOOKED_AT]):
            trials |= {trial.recipe_id: trial for trial in ranked[: 2 * _ROUTES]}
    return sorted(trials.values(), key=rank, reverse=True)[:_ROUTES]


def _links(recipe: Recipe) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Pairs of neighbouring output layers, each by its place and model."""
    names = [_model(mix) for mix in recipe.layers]
    return [((i, names[i]), (i + 1, names[i + 1])) for i in range(len(names) - 1)]


def _model(mix: Mix) -> str:
    return mix.sources[0][0] if mix.method == "passthrough" else "+".join(name for name, _ in mix.sources)
