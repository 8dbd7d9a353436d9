"""lm-eval's command line on a model folder, in a process of its own, and each item's value in its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.evaluation.lm_harness.items import item_id

REPOSITORY = Path(__file__).resolve().parents[2]
METRICS = ("exact_match", "acc")
"""The metrics that are looked for where none is named."""


def command(
    folder: Path,
    dtype: str,
    tasks: Sequence[str] | Mapping[str, Sequence[int]],
    include: Path,
    out: Path,
    batch_size: int,
) -> list[str]:
    """The command line. tasks: names, or name -> numbers of the documents that are scored."""
    chosen = ["--samples", json.dumps({task: list(rows) for task, rows in tasks.items()})]
    return [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={folder},dtype={dtype}", "--batch_size", str(batch_size)),
        *("--tasks", ",".join(tasks), "--include_path", str(include)),
        *("--log_samples", "--output_path", str(out)),
        *(chosen if isinstance(tasks, Mapping) else []),
    ]


def run(
    folder: Path,
    dtype: str,
    tasks: Sequence[str] | Mapping[str, Sequence[int]],
    include: Path,
    out: Path,
    batch_size: int = 1,
) -> None:
    """Scores a folder; what each item got is then below `out`. Ends the program where lm-eval fails."""
    words = command(folder, dtype, tasks, include, out, batch_size)
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        words, cwd=REPOSITORY, env=os.environ | quiet, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def values(
    out: Path, task: str, metric: str | None = None, filter_name: str | None = None
) -> dict[str, float]:
    """Item -> its value, from the log of a run.

    metric, filter_name: None for the first of METRICS that is there, and for any filter.
    """
    found = {}
    for row in _rows(out, task):
        if filter_name in (None, row["filter"]):
            name = metric or next(name for name in METRICS if name in row)
            found[item_id(row["doc"])] = float(row[name])
    return found


def texts(out: Path, task: str) -> dict[str, str]:
    """Item -> the text that was generated, from the log of a run; none for a task of log-likelihoods."""
    answers = {item_id(row["doc"]): row["resps"][0][0] for row in _rows(out, task)}
    return {item: answer for item, answer in answers.items() if isinstance(answer, str)}


def _rows(out: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval logged of each item."""
    file = next(out.rglob(f"samples_{task}_*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]
