"""Routes in words, what depth is worth, and how a search went from stage to stage."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.recipes import Recipe
from evomerge.store import Outcome, Store, Trial


def depths(store: Store) -> dict[str, int]:
    """The depth of a study's base for `Recipe.is_route`: that of the parents it scored first, which are of the base's shape."""
    parents = (store.recipe(t.recipe_id) for t in store.trials() if t.origin == "parent")
    return {recipe.base: len(recipe.layers) for recipe in parents}


def hops(recipe: Recipe) -> str:
    """'math 0-3, lang 2 x 1.05, math 4-5': runs of layers with the factor of the hidden state that enters them."""
    scales = recipe.scales or (1.0,) * len(recipe.layers)
    runs: list[tuple[str, int, int, float]] = []
    for mix, scale in zip(recipe.layers, scales, strict=True):
        model, layer = mix.sources[0]
        name = model if mix.method == "passthrough" else f"{mix.method} of {', '.join(mix.models)}"
        at = -1 if layer is None else layer
        if runs and runs[-1][0] == name and runs[-1][2] + 1 == at and scale == 1.0:
            runs[-1] = (name, runs[-1][1], at, runs[-1][3])
        else:
            runs.append((name, at, at, scale))
    parts = [
        f"{name} {a if a == b else f'{a}-{b}'}" + (f" x {scale:g}" if scale != 1 else "")
        for name, a, b, scale in runs
    ]
    return ", ".join(parts)


def described(recipe: Recipe) -> list[str]:
    """The route, and where its embeddings and head come from."""
    outer = (
        recipe.embeddings.sources[0][0]
        if recipe.embeddings.method == "passthrough"
        else recipe.embeddings.method
    )
    return [
        f"Route of {len(recipe.layers)} layers, embeddings and head of {outer}; a factor is of the hidden state that enters a layer:",
        "",
        hops(recipe),
    ]


def stages_read(recipe: Recipe) -> list[str]:
    """Which merge each stage is that a recipe reads like a model."""
    return [
        line
        for name, stage in recipe.stages
        for line in (f"`{name}` is recipe `{stage.id}`, of the stage before.", "")
    ]


def depth(trials: Sequence[Trial]) -> list[str]:
    """Score against depth: of each number of layers how many candidates there were, how many the gate kept out, and their scores."""
    rows: dict[int, list[Trial]] = {}
    for trial in trials:
        if "layers" in trial.costs:
            rows.setdefault(int(trial.costs["layers"]), []).append(trial)
    if len(rows) < 2:
        return []
    out = [
        "## Score against depth", "",
        "Search scores, each on its generation's items; seconds are of the scoring alone, median.", "",
        "| layers | parameters | candidates | kept out or failed | best | median | seconds |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for layers, own in sorted(rows.items()):
        scores = [t.reported for t in own if t.reported is not None]
        seconds = [t.seconds["score"] for t in own if t.score is not None and "score" in t.seconds]
        numbers = f"{max(scores):.3f} | {statistics.median(scores):.3f}" if scores else "– | –"
        spent = f"{statistics.median(seconds):.3f}" if seconds else "–"
        out.append(
            f"| {layers} | {own[0].costs['parameters']:,.0f} | {len(own)} | {len(own) - len(scores)} | {numbers} | {spent} |"
        )
    return [*out, ""]


def stages(outcome: Outcome, finalists: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row a stage: its generations and its best finalist on validation."""
    if len(outcome.stages) < 2:
        return []
    known = {f["id"]: f for f in finalists}
    out = [
        "## Stages",
        "",
        "| stage | generations | best finalist | validation |",
        "| --- | --- | --- | --- |",
    ]
    for stage in outcome.stages:
        finalist = {} if stage.best is None else known.get(stage.best, {})
        score = finalist.get("validation")
        validation = "–" if score is None else f"{score:.3f}"
        out.append(f"| {stage.stage} | {stage.first} to {stage.last} | {stage.best} | {validation} |")
    return [
        *out,
        "",
        "Each stage but the first began at what was best on validation so far, parents and hand recipes among it.",
        "",
    ]
