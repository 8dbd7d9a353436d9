"""The stages of a finished search: what each cost, and how far it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.store import Store, Trial


def stage_rows(store: Store, trials: Sequence[Trial] | None = None) -> list[dict[str, Any]]:
    """Sums up the stages of a finished search.

    Args:
        store: An open study.
        trials: All of its trials, where the caller has read them; None to read them here.

    Returns:
        A row for each stage: `stage`, `first` and `last` generation, `genes`, `candidates`, `forwards` and
        `gradients` (items scored without and with their gradient), `item_forwards` (a gradient counted as
        three), and of its best finalist on validation `best` (its id), `origin`, `label` and `validation`.
        Empty before the end.
    """
    study = store.study()
    if study is None or study.outcome is None:
        return []
    finalists = {row["id"]: row for row in study.outcome.finalists}
    genes: dict[int, int] = {}
    for trial in store.trials() if trials is None else trials:
        if trial.genome is not None and trial.generation > 0:
            genes[trial.stage] = len(trial.genome)
    rows = []
    for number, stage in enumerate(study.outcome.stages):
        cost = store.usage.cost(number)
        best: Mapping[str, Any] = {} if stage.best is None else finalists.get(stage.best, {})
        rows.append(
            {
                "stage": stage.stage,
                "first": stage.first,
                "last": stage.last,
                "genes": genes.get(number),
                "candidates": cost.candidates,
                "forwards": cost.forwards,
                "gradients": cost.gradients,
                "item_forwards": cost.item_forwards,
                "best": stage.best,
                "origin": best.get("origin"),
                "label": best.get("label"),
                "validation": best.get("validation"),
            }
        )
    return rows


def stage_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tabulates the stages of a finished search.

    Args:
        rows: What `stage_rows` gives.

    Returns:
        Lines of Markdown with a row for each stage: its generations, what it cost and its best finalist on
        validation; empty for one stage of evolution.
    """
    learned = any(row["gradients"] for row in rows)
    if len(rows) < 2 and not learned:
        return []
    lines = [
        "## Stages",
        "",
        "| stage | generations | genes | items | items with gradient | best finalist | validation |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        validation = "–" if row["validation"] is None else f"{row['validation']:.3f}"
        best = "none" if row["best"] is None else f"{row['best']}"
        if row["label"] and row["origin"] == "mean":
            best += f" ({row['label']})"
        cells = [
            row["stage"],
            f"{row['first']} to {row['last']}",
            "–" if row["genes"] is None else f"{row['genes']}",
            f"{row['forwards']:,}",
            f"{row['gradients']:,}",
            best,
            validation,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Each stage but the first began at what was best on validation so far, parents and hand recipes "
        "among it. An item with its gradient costs three item forwards; parents, hand recipes and the "
        "choice of the winner are not counted.",
        "",
    ]


def stage_sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says in a line for each stage what it cost and how far it came.

    Args:
        rows: What `stage_rows` gives.

    Returns:
        The lines; none for a single stage.
    """
    if len(rows) < 2:
        return []
    lines = []
    for number, row in enumerate(rows, 1):
        reached = "no finalist" if row["validation"] is None else f"{row['validation']:.3f} on validation"
        lines.append(f"stage {number}, {row['stage']}: {reached} for {row['item_forwards']:,} item forwards")
    return lines
