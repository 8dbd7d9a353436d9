"""Two candidates beside one another on the items that both were scored on, with outputs that are kept."""

from __future__ import annotations

import math
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation import ROLES, Objective, Role
from evomerge.reports.comparison import Contender, common_items, compare, contender, most_different_items
from evomerge.reports.outputs import stored_outputs
from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot

_ITEMS = 8  # whose outputs are shown
_LONGEST = 400  # characters of a text
_TITLE = "Two candidates compared"
_CAPTION = (
    "Both on the same items, paired; the bars are 95 % intervals of the difference, corrected p by Holm. "
    "Below: items on which they differ most."
)


def pair(snapshot: Snapshot, one: str = "", other: str = "") -> Panel:
    """Makes the panel that compares two candidates.

    Args:
        snapshot: Of the study.
        one: The first: a number, 'best' or a label; '' for the best.
        other: The second; '' for the best parent.

    Returns:
        Scores and paired differences by task, on the most independent items that both were scored on: test,
        else validation, else search.
    """
    best = snapshot.best
    if best is None:
        return Panel("pair", _TITLE, _CAPTION, note="No candidate has been scored yet.")
    parent = snapshot.best_parent()
    names = [one or str(best.id), other or (str(parent.id) if parent is not None else "")]
    objective = snapshot.objective
    if not names[1] or objective is None:
        return Panel("pair", _TITLE, _CAPTION, note="There is no second candidate to compare with.")
    try:
        compared = _compared(snapshot, names, objective)
    except StudyError as error:
        return Panel("pair", _TITLE, _CAPTION, _form(snapshot, names), note=str(error))
    return compared


def _compared(snapshot: Snapshot, names: list[str], objective: Objective) -> Panel:
    role, contenders = _contenders(snapshot, names)
    data = compare(contenders[::-1], objective)  # differences are of the first to the second
    labels = [_label(snapshot, contender) for contender in contenders]
    rows = []
    for row in data["rows"]:
        difference = row["differences"][0]
        mean = None if difference is None else difference["mean"]
        error = None if difference is None else difference["error"]
        half = None if error is None else 1.96 * error
        rows.append(
            (row["task"], row["items"], row["scores"][1], row["scores"][0], mean, half, _p(difference))
        )
    columns = (
        Column("task"),
        Column("items", "count"),
        Column(labels[0], "score"),
        Column(labels[1], "score"),
        Column("difference", "signed"),
        Column("± 95 %", "score"),
        Column("p (Holm)"),
    )
    chart = _form(snapshot, names) | {
        "names": labels,
        "role": role,
        "tasks": [row[0] for row in rows],
        "differences": [rounded(row[4]) for row in rows],
        "halves": [rounded(row[5]) for row in rows],
    }
    tables = [Table(f"On {data['items']} {role} items", columns, tuple(rows))]
    tables += _outputs(snapshot, contenders, labels, objective)
    return Panel("pair", _TITLE, _CAPTION, chart, tuple(tables), _output_note(snapshot, names, tables, role))


def _contenders(snapshot: Snapshot, names: list[str]) -> tuple[Role, list[Contender]]:
    """The most independent role in which both were scored on a common item."""
    for role in reversed(ROLES):
        contenders = [contender(snapshot.store, name, name, role) for name in names]
        if contenders[0].scores.keys() & contenders[1].scores.keys():
            return role, contenders
    study = snapshot.study.name
    raise StudyError(
        f"{names[0]} and {names[1]} were scored on no common items; score them with: "
        f"evomerge compare {study}/{names[0]} {study}/{names[1]} --score"
    )


def _label(snapshot: Snapshot, contender: Contender) -> str:
    return snapshot.name(contender.trial)


def _p(difference: dict[str, Any] | None) -> str:
    if difference is None or not math.isfinite(difference["p_holm"]):
        return "–"
    return f"{difference['p_holm']:.3f}" if difference["p_holm"] >= 0.001 else "< 0.001"


def _form(snapshot: Snapshot, names: list[str]) -> dict[str, Any]:
    """What the two boxes of the page hold and propose."""
    proposed = [str(trial.label) for trial in snapshot.references if trial.label]
    proposed += [str(trial.id) for trial in snapshot.ranked[:20]]
    return {"one": names[0], "other": names[1], "proposed": list(dict.fromkeys(["best", *proposed]))}


def _outputs(
    snapshot: Snapshot, contenders: list[Contender], labels: list[str], objective: Objective
) -> list[Table]:
    """Items that the two differ on, with the outputs that a comparison has stored."""
    items = most_different_items(contenders, common_items(contenders), _ITEMS)
    keys = [(task, item) for task, ids in items.items() for item in ids]
    outputs = [stored_outputs(snapshot.store.path.parent, c.recipe.id) for c in contenders]
    shared = [key for key in outputs[0] if key in outputs[1] and all(key in c.scores for c in contenders)]
    if shared:
        columns = (Column("task"), Column("prompt"), Column("right answer"), *map(Column, labels))
        rows = []
        for key in shared[:_ITEMS]:
            first, second = outputs[0][key], outputs[1][key]
            texts = (first["prompt"], first["target"], first["output"], second["output"])
            rows.append((key[0], *map(_end, texts)))
        return [Table("Outputs", columns, tuple(rows))]
    columns = (Column("task"), Column("item"), *(Column(label, "score") for label in labels))
    values = [(task, item, *(c.scores[task, item].value for c in contenders)) for task, item in keys]
    return [Table("Items that they differ on", columns, tuple(values))] if values else []


def _end(text: str) -> str:
    """The last part of a text: a prompt ends with its question."""
    return text.strip() if len(text) <= _LONGEST else f"… {text[-_LONGEST:].strip()}"


def _output_note(snapshot: Snapshot, names: list[str], tables: list[Table], role: str) -> str:
    if tables[-1].caption == "Outputs":
        return ""
    study = snapshot.study.name
    return (
        "To read what they answer here: "
        f"evomerge compare {study}/{names[0]} {study}/{names[1]} --role {role} --samples {_ITEMS}"
    )
