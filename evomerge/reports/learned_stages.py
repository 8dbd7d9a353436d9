"""Learned stages in reports: whose answers were labels, and whether the surrogate follows the metrics."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.store import Store, StudyRow, Trial


def agreements(study: StudyRow) -> list[dict[str, Any]]:
    """Lists the rank correlations of surrogates with metrics.

    Args:
        study: A study.

    Returns:
        `stage`, from 1, and what is stored of its `evomerge.store.Agreement`, with its `sentence`; empty
        before the end and without a learned stage.
    """
    stages = () if study.outcome is None else study.outcome.stages
    return [
        {"stage": number, **stage.agreement.to_json(), "sentence": stage.agreement.sentence}
        for number, stage in enumerate(stages, 1)
        if stage.agreement is not None
    ]


def label_rows(store: Store, study: StudyRow, trials: Sequence[Trial] | None = None) -> list[dict[str, Any]]:
    """Lists where labels come from.

    Args:
        store: An open study.
        study: Its row.
        trials: All of its trials, where the caller has read them; None to read them here.

    Returns:
        For each task and parent: `task`, `model`, `recipe`, the number of `items` that it was asked (those on
        which the surrogate is compared with the metric among them) and of `answers` that it gave, when they
        were `made` (UTC), and the `version` of the task, as the study's facts have it.
    """
    trials = store.trials() if trials is None else trials
    models = {trial.recipe_id: str(trial.label) for trial in trials if trial.origin == "parent"}
    tasks = {subtask: task for task, facts in study.facts.terms.items() for subtask, _ in facts.subtasks}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in store.usage.labels():
        evaluation = row.evaluation
        made = datetime.datetime.fromtimestamp(row.created, datetime.UTC).isoformat(timespec="seconds")
        for score, answer in zip(evaluation.items, evaluation.answers, strict=True):
            own = rows.setdefault(
                (score.task, evaluation.recipe_id),
                {
                    "task": score.task,
                    "model": models.get(evaluation.recipe_id, evaluation.recipe_id),
                    "recipe": evaluation.recipe_id,
                    "items": 0,
                    "answers": 0,
                    "made": made,
                    "version": study.facts.tasks.get(tasks.get(score.task, score.task), ""),
                },
            )
            own["items"] += 1
            own["answers"] += answer is not None
    return list(rows.values())


def agreement_line(row: Mapping[str, Any]) -> str:
    """Says how well a surrogate ranks candidates.

    Args:
        row: Of `agreements`.

    Returns:
        A sentence.
    """
    of_tasks = ", ".join(f"{task} {_number(value)}" for task, value in row["tasks"].items())
    line = (
        f"rank correlation of surrogate and metric {_number(row['correlation'])} over {row['candidates']} "
        f"candidates and {row['items']} validation items ({of_tasks}); {row['forwards']} item forwards for it"
    )
    return f"{line}; {row['sentence']}" if row["sentence"] else line


def learned_lines(rows: Sequence[Mapping[str, Any]], labels: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes the part of a report about learned stages.

    Args:
        rows: As `agreements` gives them, safe for Markdown.
        labels: As `label_rows` gives them, safe for Markdown.

    Returns:
        Lines of Markdown; empty without either.
    """
    if not rows and not labels:
        return []
    lines = ["## What was climbed", ""]
    lines += [f"- Stage {row['stage']}: {agreement_line(row)}." for row in rows]
    lines += [""] * bool(rows)
    if labels:
        lines += [
            "Answers of models stood for right ones:",
            "",
            "| task | model | items | answers | made (UTC) | version of the task |",
            "| --- | --- | ---: | ---: | --- | --- |",
        ]
        lines += [
            f"| {row['task']} | {row['model']} | {row['items']} | {row['answers']} | {row['made']} | "
            f"{row['version'][:12]} |"
            for row in labels
        ]
        lines.append("")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
