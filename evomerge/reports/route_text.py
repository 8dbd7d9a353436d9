"""Text about routes of layers: a route in words, and scores by depth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from evomerge._escaping import markdown, markdown_code
from evomerge.recipes import Recipe
from evomerge.store import Store, Trial


def depths(store: Store) -> dict[str, int]:
    """Looks up the depth of a study's base for `Recipe.is_route`.

    Args:
        store: An open study.

    Returns:
        Base -> number of layers: that of the parents, which were scored first and have the base's shape.
    """
    parents = (store.recipe(trial.recipe_id) for trial in store.trials() if trial.origin == "parent")
    return {recipe.base: len(recipe.layers) for recipe in parents}


def hops(recipe: Recipe) -> str:
    """Writes a route in words.

    Args:
        recipe: A recipe of layers taken over or merged.

    Returns:
        Runs of layers with the factor of the hidden state that enters them: 'math 0-3, lang 2 x 1.05, math
        4-5'.
    """
    scales = recipe.scales or (1.0,) * len(recipe.layers)
    runs: list[tuple[str, int, int, float]] = []  # model or merge, first layer, last layer, factor
    for mix, scale in zip(recipe.layers, scales, strict=True):
        model, source_layer = mix.sources[0]
        name = model if mix.method == "passthrough" else f"{mix.method} of {', '.join(mix.models)}"
        layer = -1 if source_layer is None else source_layer
        if runs and runs[-1][0] == name and runs[-1][2] + 1 == layer and scale == 1.0:
            runs[-1] = (name, runs[-1][1], layer, runs[-1][3])
        else:
            runs.append((name, layer, layer, scale))
    parts = []
    for name, first, last, scale in runs:
        layers = str(first) if first == last else f"{first}-{last}"
        factor = f" x {scale:g}" if scale != 1 else ""
        parts.append(f"{name} {layers}{factor}")
    return ", ".join(parts)


def route_lines(recipe: Recipe) -> list[str]:
    """Describes a route for a report.

    Args:
        recipe: A route.

    Returns:
        Lines of Markdown: where its embeddings and head come from, and its layers.
    """
    embeddings = recipe.embeddings
    outer = embeddings.sources[0][0] if embeddings.method == "passthrough" else embeddings.method
    return [
        f"Route of {len(recipe.layers)} layers, embeddings and head of {markdown(outer)}; "
        "a factor is of the hidden state that enters a layer:",
        "",
        markdown(hops(recipe)),
    ]


def methods_by_place(recipe: Recipe) -> list[tuple[str, str]]:
    """Lists the methods of a merge by several.

    Args:
        recipe: Any recipe.

    Returns:
        (method, its places: 'embeddings, layers 0-3, head'), in the order of the output; empty for a recipe
        with one method.
    """
    runs: list[tuple[str, int, int]] = []  # method, first layer, last layer
    for layer, mix in enumerate(recipe.layers):
        if runs and runs[-1][0] == mix.method:
            runs[-1] = (mix.method, runs[-1][1], layer)
        else:
            runs.append((mix.method, layer, layer))
    placed = [(name, f"layer {a}" if a == b else f"layers {a}-{b}") for name, a, b in runs]
    placed = [(recipe.embeddings.method, "embeddings"), *placed, (recipe.head.method, "head")]
    by_method: dict[str, list[str]] = {}
    for name, place in placed:
        by_method.setdefault(name, []).append(place)
    if len(by_method) < 2:
        return []
    return [(name, ", ".join(places)) for name, places in by_method.items()]


def intermediate_merges(recipe: Recipe) -> list[str]:
    """Names the intermediate merges that a recipe reads like models.

    Args:
        recipe: Any recipe.

    Returns:
        Lines of Markdown, empty without intermediate merges.
    """
    lines = []
    for name, merge in recipe.stages:
        lines += [f"{markdown_code(name)} is recipe `{merge.id}`, of the stage before.", ""]
    return lines


def scores_by_depth(trials: Sequence[Trial]) -> list[str]:
    """Tabulates scores by number of layers.

    Args:
        trials: Candidates of a search, without parents and hand recipes.

    Returns:
        Lines of Markdown with a row for each number of layers: how many candidates there were, how many were
        rejected by the perplexity screen or failed, their scores and seconds; empty where all have the same
        number.
    """
    by_layers: dict[int, list[Trial]] = {}
    for trial in trials:
        if "layers" in trial.costs:
            by_layers.setdefault(int(trial.costs["layers"]), []).append(trial)
    if len(by_layers) < 2:
        return []
    lines = [
        "## Score against depth",
        "",
        "Search scores, each on its generation's items; seconds are of the scoring alone, median.",
        "",
        "| layers | parameters | candidates | screened out or failed | best | median | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_depth_row(layers, same_depth) for layers, same_depth in sorted(by_layers.items())]
    return [*lines, ""]


def _depth_row(layers: int, trials: Sequence[Trial]) -> str:
    scores = [trial.reported for trial in trials if trial.reported is not None]
    seconds = [
        trial.seconds["score"] for trial in trials if trial.score is not None and "score" in trial.seconds
    ]
    best = f"{max(scores):.3f}" if scores else "–"
    median = f"{statistics.median(scores):.3f}" if scores else "–"
    median_seconds = f"{statistics.median(seconds):.3f}" if seconds else "–"
    parameters = f"{trials[0].costs['parameters']:,.0f}"
    rejected = len(trials) - len(scores)
    cells = [str(layers), parameters, str(len(trials)), str(rejected), best, median, median_seconds]
    return f"| {' | '.join(cells)} |"
