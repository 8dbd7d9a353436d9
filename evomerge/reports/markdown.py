"""The report of a finished study: a Markdown file whose first line is the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge._escaping import markdown, markdown_data
from evomerge.errors import StudyError
from evomerge.recipes import Filtered, Mix, PerRow, Recipe, Setting
from evomerge.reports import route_text
from evomerge.reports.learned_stages import learned_lines
from evomerge.reports.stages import stage_table
from evomerge.reports.summary import front, lost_skills, study_summary, test_item_uses
from evomerge.reports.verdict import verdict
from evomerge.store import Store, Trial

_INTERVALS = (
    "Wilson's score interval for shares of right answers and other values between 0 and 1, Student's t for "
    "other values; tasks are combined by MOVER, leads are paired"
)
"""How `evomerge.evaluation.intervals` makes intervals; that module loads scipy."""


def study_markdown(store: Store) -> str:
    """Writes the report of a study.

    Args:
        store: An open study that is done.

    Returns:
        Markdown: the verdict, scores of the best beside parents and hand recipes, finalists, retention,
            trade-offs, what the
        best is made of, and how the search went.

    Raises:
        StudyError: The study is not finished.
    """
    study = store.study()
    if study is None or study.outcome is None:
        raise StudyError(f"{store.path.parent.name} is not finished; there is nothing to report yet")
    data = markdown_data(study_summary(store))
    best, references = data["best"], data["references"]
    found = verdict(data)
    alike = found.kind == "alike"
    lines = [f"# {study.name}: {'no winner: ' if alike else ''}{found.sentence}", ""]
    lines += _overview(data)
    lines += _flat_tasks(data["flat"])
    lines += _scores(study.name, best, references, [markdown(task) for task in study.facts.tasks])
    lines += _selection_bias(best)
    lines += _finalists([*data["finalists"], *references])
    lines += _retention(data["retention"])
    lines += _trade_offs(store)
    lines += stage_table(data["stages"])
    lines += learned_lines(data["agreements"], data["labels"])
    lines += route_text.scores_by_depth([trial for trial in store.trials() if trial.generation > 0])
    lines += [
        "## One of the candidates, which score alike" if alike else "## The best candidate",
        "",
        *_recipe(store.recipe(best["recipe"]), route_text.depths(store)),
        "",
        "## The search",
        "",
        "| generation | best | median | dropped | failed |",
        "| --- | --- | --- | --- | --- |",
        *_history(store),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in sorted(study.facts.versions.items())),
        "",
    ]
    failures = [f"- candidate {trial.id}: {markdown(trial.error)}" for trial in store.trials() if trial.error]
    if failures:
        lines += ["## Failed candidates", "", *failures, ""]
    return "\n".join(lines)


def _overview(data: Mapping[str, Any]) -> list[str]:
    uses = test_item_uses(data) or "test items were not used"
    return [
        f"Seed {data['seed']}, {data['evaluations']} candidates in {data['generations']} generations, "
        f"{data['failed']} failed evaluations. Search scores are on the items of the candidate's generation; "
        f"validation chose the winner. {uses[:1].upper()}{uses[1:]}.",
        "",
        *_metrics(data["metrics"]),
    ]


def _metrics(metrics: Mapping[str, str]) -> list[str]:
    """What is scored of each task, and by which filter."""
    if not metrics:
        return []
    return [f"Scored: {'; '.join(f'{task} by {name}' for task, name in metrics.items())}.", ""]


def _flat_tasks(sentences: Sequence[str]) -> list[str]:
    """Tasks that could teach the search nothing."""
    if not sentences:
        return []
    listed = "; ".join(sentences)
    return [
        f"**Without a signal before the search:** {listed} (first items of the search). What the scores of "
        "such a task say of the winner is chance or the task's own prompt and filter.",
        "",
    ]


def _scores(
    study: str, best: Mapping[str, Any], references: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> list[str]:
    """The best and what it is compared with, by role and task."""
    columns = ["search", "validation", "test", "lead of the best ± s.e.", *(f"{t} (test)" for t in tasks)]
    return [
        "## Scores",
        "",
        f"| | {' | '.join(columns)} |",
        "| --- " * (1 + len(columns)) + "|",
        _score_row(f"**{study}/{best['id']}** ({best['origin']})", best, tasks),
        *(_score_row(str(row["label"]), row, tasks) for row in references),
        "",
        f"The lead is the paired difference on the test items. 95 % intervals: {_INTERVALS}.",
        "",
    ]


def _score_row(name: str, row: Mapping[str, Any], tasks: Sequence[str]) -> str:
    metrics = row.get("test_metrics", {})
    lead = f"{row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
    cells = [_number(row.get(role), "failed") for role in ("search", "validation", "test")]
    cells += [lead, *(_number(metrics.get(task), "failed") for task in tasks)]
    return f"| {name} | {' | '.join(cells)} |"


def _number(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.3f}"


def _selection_bias(best: Mapping[str, Any]) -> list[str]:
    if "luck" not in best:
        return []
    return [
        f"The winner's search score is {best['luck']:+.3f} ± {best['luck_error']:.3f} above its test score: "
        "the selection bias of a score that it was chosen by.",
        "",
    ]


def _finalists(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "## Finalists",
        "",
        "| | search | estimate ± s.e. | validation | p |",
        "| --- | --- | --- | --- | --- |",
        *(_finalist_row(row) for row in rows),
        "",
        "The estimate is of the objective over all search items, as the search sees it: what compares "
        "candidates of different generations. p: two-sided, of the difference to the winner on validation, "
        "paired, corrected by Holm for their number.",
        "",
    ]


def _finalist_row(row: Mapping[str, Any]) -> str:
    estimate = f"{row['estimate']:.3f} ± {row['estimate_error']:.3f}" if "estimate" in row else ""
    cells = [
        f"{row['label'] or row['id']} ({row['origin']})",
        _number(row["search"], ""),
        estimate,
        _number(row.get("validation"), ""),
        _p_value(row.get("p")),
    ]
    return f"| {' | '.join(cells)} |"


def _p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _retention(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The winner's lead over each parent by task."""
    if not rows:
        return []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parents = list(dict.fromkeys(row["parent"] for row in rows))
    cells = {}
    for row in rows:
        mark = " **LOST**" if row["lost"] else ""
        cells[row["task"], row["parent"]] = f"{row['difference']:+.3f} ± {row['error']:.3f}{mark}"
    table = [
        f"| {task} | {' | '.join(cells.get((task, parent), '') for parent in parents)} |" for task in tasks
    ]
    return [
        "## Skills kept",
        "",
        f"Retention: {lost_skills(rows)}. The winner against each parent on the test items, paired, "
        "higher is better; lost where it falls by more than 1.96 errors (2.5 % a cell, not corrected for "
        "their number).",
        "",
        f"| task | {' | '.join(parents)} |",
        "| --- " * (1 + len(parents)) + "|",
        *table,
        "",
    ]


def _trade_offs(store: Store) -> list[str]:
    """The Pareto front over tasks."""
    data = markdown_data(front(store))
    tasks = data["tasks"]
    if not data["candidates"] or len(tasks) < 2:
        return []
    table = []
    for row in data["candidates"]:
        metrics = " | ".join(f"{row['metrics'][task]:.3f}" for task in tasks)
        table.append(
            f"| {row['label'] or row['id']} ({row['origin']}) | {row['objective']:.3f} | {metrics} |"
        )
    return [
        "## Trade-offs",
        "",
        f"No candidate scored on the same items ({data['items']}) is at least as good in every task "
        "and better in one.",
        "",
        f"| | objective | {' | '.join(tasks)} |",
        "| --- " * (2 + len(tasks)) + "|",
        *table,
        "",
    ]


def _recipe(recipe: Recipe, depths: Mapping[str, int]) -> list[str]:
    """Parameters by model, a row for each run of places mixed alike. depths: see `Recipe.is_route`."""
    methods = route_text.methods_by_place(recipe)
    named = ", ".join(name for name, _ in methods) or recipe.layers[0].method
    lines = [f"Recipe `{recipe.id}`, {named}, base {markdown(recipe.base)}, {recipe.out_dtype}.", ""]
    is_route = recipe.is_route(depths)
    if is_route:
        lines += [*route_text.route_lines(recipe), ""]
    elif methods:
        lines += [*(f"- {name} in {places}" for name, places in methods), ""]
    lines += route_text.intermediate_merges(recipe)
    if is_route and all(mix.method == "passthrough" for mix in recipe.layers):
        return lines
    lines += ["| tensors | parameter | model | value |", "| --- | --- | --- | --- |"]
    for places, mix in _mixed_alike(recipe):
        for param, values in mix.params:
            if not isinstance(values, tuple):
                continue
            for (model, _), value in zip(mix.sources, values, strict=True):
                lines.append(f"| {places} | {param} | {markdown(model)} | {markdown(_setting(value))} |")
    return lines


def _mixed_alike(recipe: Recipe) -> list[tuple[str, Mix]]:
    """(places in words, their mix): embeddings, runs of layers with the same method and parameters, head."""
    runs: list[tuple[int, int, Mix]] = []
    for layer, mix in enumerate(recipe.layers):
        if runs and (runs[-1][2].method, runs[-1][2].params) == (mix.method, mix.params):
            runs[-1] = (runs[-1][0], layer, mix)
        else:
            runs.append((layer, layer, mix))
    layers = [
        (f"layer {first}" if first == last else f"layer {first} to {last}", mix) for first, last, mix in runs
    ]
    return [("embeddings", recipe.embeddings), *layers, ("head", recipe.head)]


def _setting(value: Setting) -> str:
    if isinstance(value, Filtered):
        return ", ".join(f"{text.strip('.')} {number:g}" for text, number in value.cases)
    if isinstance(value, PerRow):
        numbers = value.numbers[:-1]
        mean = math.fsum(numbers) / len(numbers)
        return f"{len(numbers):,} by row, {min(numbers):g} to {max(numbers):g}, mean {mean:.3g}"
    return f"{value:g}"


def _history(store: Store) -> list[str]:
    """One row a generation; the best is of those that were scored in full."""
    generations: dict[int, list[Trial]] = {}
    for trial in store.trials():
        if trial.origin != "mean":
            generations.setdefault(trial.generation, []).append(trial)
    lines = []
    for generation, trials in generations.items():
        name = "parents and hand recipes" if generation == 0 else str(generation)
        scores = sorted(trial.score for trial in trials if trial.score is not None)
        in_full = [trial.score for trial in trials if trial.score is not None and trial.dropped is None]
        best = f"{max(in_full):.3f}" if in_full else "–"
        median = f"{scores[len(scores) // 2]:.3f}" if in_full else "–"
        dropped = sum(trial.dropped is not None for trial in trials)
        lines.append(f"| {name} | {best} | {median} | {dropped} | {len(trials) - len(scores)} |")
    return lines
