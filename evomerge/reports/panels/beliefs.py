"""What the search believes: coefficients by layer group and model, generation after generation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from evomerge.recipes import Recipe
from evomerge.reports.panels.coefficients import EMBEDDINGS, HEAD, Cell, coefficients
from evomerge.reports.panels.panel import Column, Panel, Table, rounded, spread_out
from evomerge.reports.panels.snapshot import Snapshot

_GENERATIONS = 40  # that the slider has
_ELITES = 4  # candidates of a generation that are averaged
_CLOSE = 5e-4  # layers whose coefficients differ by less in every generation are one row
_ORDER = ("attention", "mlp", "other", "")

_Values = dict[Cell, dict[str, float]]


def beliefs(snapshot: Snapshot) -> Panel:
    """Makes the panel of coefficients.

    Args:
        snapshot: Of the study.

    Returns:
        For up to 40 generations the mean coefficient of each model in each layer group, over the better half
        of the generation's candidates (4 at most).
    """
    title = "What the search believes"
    caption = (
        "Mean coefficient of each model by layers and component, over the best of a generation; of a route, "
        "how often a layer comes from the model. Move the slider through the generations."
    )
    numbers = spread_out(list(snapshot.generations), _GENERATIONS)
    means = {number: values for number in numbers if (values := _means(snapshot, number))}
    if not means:
        return Panel("beliefs", title, caption, note="No generation is complete yet.")
    models = list(dict.fromkeys(m for values in means.values() for shares in values.values() for m in shares))
    cells = _cells(means)
    groups = _groups(cells, means, models)
    names = [_name(group) for group in groups]
    table = [[_row(values.get(group[0]), models) for group in groups] for values in means.values()]
    flat = [number for rows in table for row in rows for number in row if number is not None]
    chart = {
        "generations": list(means),
        "rows": names,
        "models": models,
        "values": table,
        "low": min(0.0, *flat),
        "high": max(flat),
    }
    columns = (Column("layers"), *(Column(model, "score") for model in models))
    rows = tuple(
        (name, *values) for name, values in zip(names, table[-1], strict=True) if values[0] is not None
    )
    last = Table(f"Coefficients in generation {list(means)[-1]}", columns, rows)
    return Panel("beliefs", title, caption, chart, (last,))


def _row(shares: dict[str, float] | None, models: list[str]) -> list[float | None]:
    """A row of the map; nothing where the generation has no such place, as routes of other lengths."""
    if shares is None:
        return [None] * len(models)
    return [rounded(shares.get(model, 0.0), 3) for model in models]


def recipe_rows(recipe: Recipe) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Tabulates how much of each model one recipe takes.

    Args:
        recipe: A merge of models, or a route of layers.

    Returns:
        (names of the models, (layers and component, coefficient of each model) of each row).
    """
    models, names, rows = recipe_table({0: recipe})
    return models, [(name, row) for name, row in zip(names, rows[0], strict=True) if row is not None]


def recipe_table(
    recipes: Mapping[int, Recipe],
) -> tuple[list[str], list[str], dict[int, list[list[float] | None]]]:
    """Tabulates how much of each model several recipes take, in the same rows.

    Args:
        recipes: Number -> recipe, at least one.

    Returns:
        (names of the models, layers and component of each row, number -> coefficients of each model in each
        row, None for a row that the recipe does not have).
    """
    values = {number: coefficients(recipe) for number, recipe in recipes.items()}
    models = list(dict.fromkeys(m for of in values.values() for shares in of.values() for m in shares))
    groups = _groups(_cells(values), values, models)
    rows: dict[int, list[list[float] | None]] = {}
    for number, of in values.items():
        found = [of.get(group[0]) for group in groups]
        rows[number] = [None if r is None else [r.get(model, 0.0) for model in models] for r in found]
    return models, [_name(group) for group in groups], rows


def _means(snapshot: Snapshot, generation: int) -> _Values:
    """Cell -> model -> mean coefficient over the generation's elite; a model that is not taken counts 0."""
    sums: dict[Cell, dict[str, list[float]]] = {}
    counts: Counter[Cell] = Counter()
    for trial in snapshot.elites(generation, _ELITES):
        for cell, shares in coefficients(snapshot.recipe(trial.recipe_id)).items():
            counts[cell] += 1
            for model, share in shares.items():
                sums.setdefault(cell, {}).setdefault(model, []).append(share)
    return {
        cell: {model: math.fsum(values) / counts[cell] for model, values in shares.items()}
        for cell, shares in sums.items()
    }


def _cells(means: dict[int, _Values]) -> list[Cell]:
    """All cells, from the embeddings to the head."""
    cells = {cell for values in means.values() for cell in values}
    return sorted(cells, key=lambda cell: (cell[0], _ORDER.index(cell[1])))


def _groups(cells: list[Cell], means: dict[int, _Values], models: list[str]) -> list[list[Cell]]:
    """Cells in rows: neighbouring layers of one component whose coefficients are the same throughout."""
    groups: dict[str, list[list[Cell]]] = {}
    for cell in cells:
        runs = groups.setdefault(cell[1], [])
        before = runs[-1][-1] if runs else (HEAD, "")
        if before[0] + 1 == cell[0] > 0 and _alike(before, cell, means, models):
            runs[-1].append(cell)
        else:
            runs.append([cell])
    rows = [run for runs in groups.values() for run in runs]
    return sorted(rows, key=lambda run: (run[0][0], _ORDER.index(run[0][1])))


def _alike(one: Cell, other: Cell, means: dict[int, _Values], models: list[str]) -> bool:
    for values in means.values():
        a, b = values.get(one), values.get(other)
        if a is None or b is None:
            if a is not b:
                return False
        elif any(abs(a.get(model, 0.0) - b.get(model, 0.0)) > _CLOSE for model in models):
            return False
    return True


def _name(group: list[Cell]) -> str:
    (first, component), (last, _) = group[0], group[-1]
    if first in (EMBEDDINGS, HEAD):
        return f"{'head' if first == HEAD else 'embeddings'} {component}".strip()
    layers = f"layer {first}" if first == last else f"layers {first}–{last}"
    return f"{layers} {component}".strip()
