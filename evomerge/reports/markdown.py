"""The report of a finished study: a Markdown file whose first line is the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import StudyError
from evomerge.recipes import Filtered, Recipe, Setting
from evomerge.reports import route_text
from evomerge.reports.summary import front, lost_skills, study_summary
from evomerge.store import Store, Trial


def study_markdown(store: Store) -> str:
    """Verdict, scores of the best beside parents and hand recipes, what it is made of, how the search went."""
    study = store.study()
    if study is None or study.outcome is None:
        raise StudyError(f"{store.path.parent.name} is not finished; there is nothing to report yet")
    data = study_summary(store)
    tasks = list(study.facts.tasks)
    best, references = data["best"], data["references"]
    lines = [
        f"# {study.name}: {_verdict(best, references)}",
        "",
        f"Seed {study.seed}, {data['evaluations']} candidates in {data['generations']} generations, {data['failed']} failed evaluations. "
        "Search scores are on the items of the candidate's generation; validation chose the winner; test items were scored once, after it.",
        "",
        "## Scores",
        "",
        "| | search | validation | test | lead of the best ± s.e. | "
        + " | ".join(f"{t} (test)" for t in tasks)
        + " |",
        "| --- | --- | --- | --- | --- | " + " | ".join("---" for _ in tasks) + " |",
        _line(f"**{study.name}/{best['id']}** ({best['origin']})", best, tasks),
        *(_line(str(r["label"]), r, tasks) for r in references),
        "",
        "The lead is the paired difference on the test items.",
        "",
        *_luck(best),
        "## Finalists",
        "",
        "| | search | estimate ± s.e. | validation | p |",
        "| --- | --- | --- | --- | --- |",
        *(_finalist(r) for r in [*data["finalists"], *references]),
        "",
        "The estimate is of the objective over all search items, as the search sees it: what compares candidates of different generations. "
        "p: two-sided, of the difference to the winner on validation, paired, corrected by Holm for their number.",
        "",
        *_retention(data["retention"]),
        *_trade_offs(store),
        *route_text.stages(study.outcome, data["finalists"]),
        *route_text.depth([t for t in store.trials() if t.generation > 0]),
        "## The best candidate",
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
    failures = [f"- candidate {t.id}: {t.error}" for t in store.trials() if t.error]
    if failures:
        lines += ["## Failed candidates", "", *failures, ""]
    return "\n".join(lines)


def _verdict(best: Mapping[str, Any], references: list[dict[str, Any]]) -> str:
    if best.get("test") is None:
        return f"the winner could not be scored on the test items ({best.get('error')})"
    scored = [r for r in references if r.get("test") is not None]
    parent = max((r for r in scored if r["origin"] == "parent"), key=lambda r: r["test"], default=None)
    hand = max((r for r in scored if r["origin"] == "hand"), key=lambda r: r["test"], default=None)
    parts = [f"{best['test']:.3f} on test{_between(best.get('test_interval'), '.3f')}"]
    for kind, other in (("parent", parent), ("hand recipe", hand)):
        if other is not None and other["recipe"] == best["recipe"]:
            parts.append(f"which is the {kind} '{other['label']}' itself")
        elif other is not None:
            error = _between(other.get("lead_interval"), "+.3f")
            parts.append(
                f"{best['test'] - other['test']:+.3f}{error} against the best {kind} ({other['label']}, {other['test']:.3f})"
            )
    return ", ".join(parts)


def _between(interval: Sequence[float] | None, form: str) -> str:
    """' (95 %: low to high)', and whether 0 lies in it where it is a difference's."""
    if interval is None:
        return ""
    low, high = interval
    unclear = ", no clear difference" if form.startswith("+") and low <= 0 <= high else ""
    return f" (95 %: {low:{form}} to {high:{form}}{unclear})"


def _luck(best: Mapping[str, Any]) -> list[str]:
    if "luck" not in best:
        return []
    return [
        f"The winner's search score is {best['luck']:+.3f} ± {best['luck_error']:.3f} above its test score: what it owes to having been selected.",
        "",
    ]


def _finalist(row: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    estimate = f"{row['estimate']:.3f} ± {row['estimate_error']:.3f}" if "estimate" in row else ""
    p = "" if "p" not in row else f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001"
    return f"| {row['label'] or row['id']} ({row['origin']}) | {number(row['search'])} | {estimate} | {number(row.get('validation'))} | {p} |"


def _retention(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The winner's lead over each parent by task."""
    if not rows:
        return []
    tasks, parents = (
        list(dict.fromkeys(r["task"] for r in rows)),
        list(dict.fromkeys(r["parent"] for r in rows)),
    )
    cells = {
        (r["task"], r["parent"]): f"{r['difference']:+.3f} ± {r['error']:.3f}"
        + (" **LOST**" if r["lost"] else "")
        for r in rows
    }
    return [
        "## Skills kept",
        "",
        f"Retention: {lost_skills(rows)}. The winner against each parent on the test items, paired, higher is better; lost where it falls by more than "
        "1.96 errors (2.5 % a cell, not corrected for their number).",
        "",
        "| task | " + " | ".join(parents) + " |",
        "| --- " * (1 + len(parents)) + "|",
        *(
            f"| {task} | " + " | ".join(cells.get((task, parent), "") for parent in parents) + " |"
            for task in tasks
        ),
        "",
    ]


def _trade_offs(store: Store) -> list[str]:
    """The Pareto front over tasks."""
    data = front(store)
    if not data["candidates"] or len(data["tasks"]) < 2:
        return []
    rows = [
        f"| {r['label'] or r['id']} ({r['origin']}) | {r['objective']:.3f} | "
        + " | ".join(f"{r['metrics'][t]:.3f}" for t in data["tasks"])
        + " |"
        for r in data["candidates"]
    ]
    said = f"No candidate scored on the same items ({data['items']}) is at least as good in every task and better in one."
    head = ["| | objective | " + " | ".join(data["tasks"]) + " |", "| --- " * (2 + len(data["tasks"])) + "|"]
    return ["## Trade-offs", "", said, "", *head, *rows, ""]


def _line(name: str, row: Mapping[str, Any], tasks: list[str]) -> str:
    def number(value: float | None) -> str:
        return "failed" if value is None else f"{value:.3f}"

    lead = f"{row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
    metrics = row.get("test_metrics", {})
    cells = (
        [number(row.get(k)) for k in ("search", "validation", "test")]
        + [lead]
        + [number(metrics.get(t)) for t in tasks]
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def _recipe(recipe: Recipe, depths: Mapping[str, int]) -> list[str]:
    """One row per distinct mix: parameters by model. depths: see `Recipe.is_route`."""
    lines = [f"Recipe `{recipe.id}`, {recipe.layers[0].method}, base {recipe.base}, {recipe.out_dtype}.", ""]
    is_route = recipe.is_route(depths)
    if is_route:
        lines += [*route_text.described(recipe), ""]
    lines += route_text.stages_read(recipe)
    if is_route and all(mix.method == "passthrough" for mix in recipe.layers):
        return lines
    lines += [
        "| tensors | parameter | model | value |",
        "| --- | --- | --- | --- |",
    ]
    places = [
        ("embeddings", recipe.embeddings),
        *[(f"layer {i}", m) for i, m in enumerate(recipe.layers)],
        ("head", recipe.head),
    ]
    groups: list[tuple[str, str, Any]] = []
    for name, mix in places:
        if (
            groups
            and groups[-1][2].params == mix.params
            and name.startswith("layer")
            and groups[-1][0].startswith("layer")
        ):
            groups[-1] = (groups[-1][0], name, mix)
        else:
            groups.append((name, name, mix))
    for first, last, mix in groups:
        where = first if first == last else f"{first} to {last.removeprefix('layer ')}"
        for param, value in mix.params:
            if isinstance(value, tuple):
                lines += [
                    f"| {where} | {param} | {model} | {_setting(v)} |"
                    for (model, _), v in zip(mix.sources, value, strict=True)
                ]
    return lines


def _setting(value: Setting) -> str:
    if isinstance(value, Filtered):
        return ", ".join(f"{text.strip('.')} {number:g}" for text, number in value.cases)
    return f"{value:g}"


def _history(store: Store) -> list[str]:
    """One row a generation; the best is of those that were scored in full."""
    rows: dict[int, list[Trial]] = {}
    for trial in store.trials():
        if trial.origin != "mean":
            rows.setdefault(trial.generation, []).append(trial)
    out = []
    for generation, trials in rows.items():
        good = sorted(t.score for t in trials if t.score is not None)
        best = max((t.score for t in trials if t.score is not None and t.dropped is None), default=None)
        name = "parents and hand recipes" if generation == 0 else str(generation)
        cells = f"{best:.3f} | {good[len(good) // 2]:.3f}" if best is not None else "– | –"
        out.append(
            f"| {name} | {cells} | {sum(t.dropped is not None for t in trials)} | {len(trials) - len(good)} |"
        )
    return out
