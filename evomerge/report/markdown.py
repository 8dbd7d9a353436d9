"""The report of a finished study: a Markdown file whose first line is the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import StudyError
from evomerge.recipe import Filtered, Recipe, Setting
from evomerge.report.summary import summary
from evomerge.store import Store


def markdown(store: Store) -> str:
    """Verdict, scores of the best beside parents and hand recipes, what it is made of, how the search went."""
    study = store.study()
    if study is None or study.outcome is None:
        raise StudyError(f"{store.path.parent.name} is not finished; there is nothing to report yet")
    data = summary(store)
    tasks = list(study.facts["tasks"])
    best, references = data["best"], data["references"]
    lines = [
        f"# {study.name}: {_verdict(best, references)}",
        "",
        f"Seed {study.seed}, {data['evaluations']} candidates in {data['generations']} generations, {data['failed']} failed evaluations. "
        "Search scores are on the items of the candidate's generation; validation chose the winner; test items were scored once, after it.",
        "",
        "## Scores",
        "",
        "| | search | validation | test | lead of the best ± s.e. | " + " | ".join(f"{t} (test)" for t in tasks) + " |",
        "| --- | --- | --- | --- | --- | " + " | ".join("---" for _ in tasks) + " |",
        _line(f"**{study.name}/{best['id']}** ({best['origin']})", best, tasks),
        *(_line(str(r["label"]), r, tasks) for r in references),
        "",
        "The lead is the paired difference on the test items.",
        "",
        "## The best candidate",
        "",
        *_recipe(store.recipe(best["recipe"])),
        "",
        "## The search",
        "",
        "| generation | best | median | failed |",
        "| --- | --- | --- | --- |",
        *_history(store),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in sorted(study.facts["versions"].items())),
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
    parts = [f"{best['test']:.3f} on test"]
    for kind, other in (("parent", parent), ("hand recipe", hand)):
        if other is not None:
            error = f" ± {other['lead_error']:.3f}" if "lead_error" in other else ""
            parts.append(f"{best['test'] - other['test']:+.3f}{error} against the best {kind} ({other['label']}, {other['test']:.3f})")
    return ", ".join(parts)


def _line(name: str, row: Mapping[str, Any], tasks: list[str]) -> str:
    def number(value: float | None) -> str:
        return "failed" if value is None else f"{value:.3f}"

    lead = f"{row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
    metrics = row.get("test_metrics", {})
    cells = [number(row.get(k)) for k in ("search", "validation", "test")] + [lead] + [number(metrics.get(t)) for t in tasks]
    return f"| {name} | " + " | ".join(cells) + " |"


def _recipe(recipe: Recipe) -> list[str]:
    """One row per distinct mix: parameters by model."""
    lines = [
        f"Recipe `{recipe.id}`, {recipe.layers[0].method}, base {recipe.base}, {recipe.out_dtype}.",
        "",
        "| tensors | parameter | model | value |",
        "| --- | --- | --- | --- |",
    ]
    places = [("embeddings", recipe.embeddings), *[(f"layer {i}", m) for i, m in enumerate(recipe.layers)], ("head", recipe.head)]
    groups: list[tuple[str, str, Any]] = []
    for name, mix in places:
        if groups and groups[-1][2].params == mix.params and name.startswith("layer") and groups[-1][0].startswith("layer"):
            groups[-1] = (groups[-1][0], name, mix)
        else:
            groups.append((name, name, mix))
    for first, last, mix in groups:
        where = first if first == last else f"{first} to {last.removeprefix('layer ')}"
        for param, value in mix.params:
            if isinstance(value, tuple):
                lines += [f"| {where} | {param} | {model} | {_setting(v)} |" for (model, _), v in zip(mix.sources, value, strict=True)]
    return lines


def _setting(value: Setting) -> str:
    if isinstance(value, Filtered):
        return ", ".join(f"{text.strip('.')} {number:g}" for text, number in value.cases)
    return f"{value:g}"


def _history(store: Store) -> list[str]:
    rows: dict[int, list[float | None]] = {}
    for trial in store.trials():
        if trial.origin != "mean":
            rows.setdefault(trial.generation, []).append(trial.score)
    out = []
    for generation, scores in rows.items():
        good = sorted(s for s in scores if s is not None)
        name = "parents and hand recipes" if generation == 0 else str(generation)
        cells = f"{good[-1]:.3f} | {good[len(good) // 2]:.3f}" if good else "– | –"
        out.append(f"| {name} | {cells} | {len(scores) - len(good)} |")
    return out
