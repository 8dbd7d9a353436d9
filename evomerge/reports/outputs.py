"""Outputs of candidates that `evomerge compare --samples` showed, kept beside the study for its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUTPUTS = "outputs.json"
"""Name of the file in a study's folder."""
_LARGEST = 16_000_000  # bytes that are read
_KEYS = ("task", "item", "prompt", "target", "output")
_MOST = 500  # items of a candidate that are kept, the newest


def stored_outputs(folder: Path, recipe_id: str) -> dict[tuple[str, str], dict[str, str]]:
    """Reads the outputs of a candidate.

    Args:
        folder: Folder of its study.
        recipe_id: Id of its recipe.

    Returns:
        (task, item) -> its `prompt`, the right answer as `target`, and the candidate's `output`; empty where
        none are kept, or the file is none of ours.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    rows = _read(folder / OUTPUTS).get(recipe_id, [])
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in _KEYS):
            found[row["task"], row["item"]] = {key: row[key] for key in _KEYS[2:]}
    return found


def keep_outputs(folder: Path, recipe_ids: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> None:
    """Adds what a comparison showed to the file of a study.

    Args:
        folder: Folder of the study.
        recipe_ids: Recipe of each candidate that was compared, '' for one of another study.
        samples: As `evomerge.launch.rescoring.compare` gives them: an item each, with an answer of each
            candidate.

    Raises:
        OSError: The file cannot be written.
    """
    file = folder / OUTPUTS
    kept = _read(file)
    for place, recipe_id in enumerate(recipe_ids):
        if not recipe_id:
            continue
        before = kept.get(recipe_id, [])
        rows = {(row["task"], row["item"]): row for row in before if isinstance(row, dict)}
        for sample in samples:
            rows[sample["task"], sample["item"]] = {
                "task": sample["task"],
                "item": sample["item"],
                "prompt": sample["prompt"],
                "target": sample["target"],
                "output": answer_text(sample["answers"][place]),
            }
        kept[recipe_id] = list(rows.values())[-_MOST:]
    beside = file.with_name(f"{OUTPUTS}.new")
    beside.write_text(json.dumps(kept), encoding="utf-8")
    beside.replace(file)


def answer_text(answer: Mapping[str, Any]) -> str:
    """What a candidate answered.

    Args:
        answer: With the generated `output`, or `options` of which one is `chosen`.

    Returns:
        The text, the chosen option where there are options; '' where neither is known.
    """
    if answer["output"] is not None:
        return str(answer["output"])
    return next((str(option["text"]) for option in answer["options"] if option["chosen"]), "")


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return {}
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
