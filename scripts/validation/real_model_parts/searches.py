"""Searches over a real model: one killed and resumed beside an unbroken one, and what its export scores."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.evaluation.lm_harness.items import item_id
from evomerge.store import Store
from scripts.validation import lm_eval_command
from tests.support.killing import check, kill_after
from tests.support.toy import REPO, command, environment, stored_rows

DTYPE = "float32"
"""In which equal sums round alike; bfloat16's near-ties are in results/near_ties.md."""
TASKS = (
    "real_bbh_boolean_expressions",
    "real_blimp_anaphor_number_agreement",
)
OPENING_S = 1800.0  # a first candidate takes no longer, on a machine that others use


@dataclass(frozen=True, slots=True)
class Broken:
    """A search that was killed, beside one that was not.

    Attributes:
        evaluations: Stored evaluations of the search.
        stored: Those that were there after each kill.
        tables: Tables of the store that were compared.
        other: Those whose rows are not the unbroken search's.
    """

    evaluations: int
    stored: tuple[int, ...]
    tables: int
    other: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """The winner of a study, exported and scored by lm-eval's command line.

    Attributes:
        study: Its name.
        winner: Where its recipe came from, and of how many evaluations it is the best.
        score: Stored test score.
        again: lm-eval's value of the same items.
        items: Test items.
        differ: Those with another value.
    """

    study: str
    winner: str
    score: float
    again: float
    items: int
    differ: int


def search(
    folder: Path,
    study: str,
    models: Mapping[str, Path],
    tasks: Sequence[str],
    evaluations: int,
    method: str | Sequence[str] = "task_arithmetic",
    items: int = 3,
) -> Path:
    """Writes a search file."""
    document = {
        "study": study,
        "models": {name: str(path.resolve()) for name, path in models.items()},
        "base": "base",
        "method": method if isinstance(method, str) else list(method),
        "out_dtype": DTYPE,
        "space": {
            "groups": 3,
            "embeddings": False,
            "head": False,
            "parameters": {"weight": {"low": -0.5, "high": 2.5, "start": 1.0}},
        },
        "tasks": [{"task": task} for task in tasks],
        "evaluation": {"splits": "declared", "items": items, "validation": items, "test": 4 * items},
        "search": {"evaluations": evaluations, "population": min(10, evaluations), "finalists": 2, "seed": 0},
    }
    file = folder / f"{study}.yaml"
    file.write_text(json.dumps(document, indent=1))
    return file


def run(file: Path, root: Path) -> None:
    """Runs a search to its end, or goes on with it. Ends the program where it fails."""
    process = start(file, root)
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"{file.name} ended with {process.returncode}:\n{err[-4000:]}")


def start(file: Path, root: Path) -> subprocess.Popen[str]:
    """Starts a search, or goes on with it, as a program."""
    words = command("run", file, "--resume", "--accept-floor", "--root", root)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=pipe, text=True
    )


def killed(file: Path, folder: Path, after: Sequence[int]) -> Broken:
    """Runs a search whole, and once more with a kill -9 after so many further evaluations each, then resumed.

    Both studies stay below the folder; the whole one is gone on with if it is there already.
    """
    study = json.loads(file.read_text())["study"]
    whole, parts = folder / "whole", folder / "parts"
    shutil.rmtree(parts / study, ignore_errors=True)
    run(file, whole)
    store = parts / study / "study.db"
    rows: dict[str, list[dict[str, Any]]] = check(store, {})
    stored = []
    for more in after:
        process = start(file, parts)
        kill_after(process, store, more, 0, limit=OPENING_S)
        _, err = process.communicate()
        if process.returncode != -signal.SIGKILL:
            sys.exit(f"{file.name} was not killed but ended with {process.returncode}:\n{err[-4000:]}")
        rows = check(store, rows)
        stored.append(len(rows["evaluations"]))
    run(file, parts)
    final, unbroken = check(store, rows), stored_rows(whole / study / "study.db")
    other = tuple(table for table in unbroken if final.get(table) != unbroken[table])
    return Broken(len(final["evaluations"]), tuple(stored), len(unbroken), other)


def exported(root: Path, study: str, include: Path) -> Exported:
    """Exports the winner of a study with weights; lm-eval scores the folder on the winner's test items."""
    with Store.open(root / study / "study.db") as store:
        row = store.study()
        assert row is not None
        assert row.outcome is not None
        best = row.outcome.best
        evaluation = next(s.evaluation for role, s in store.evaluations(best["recipe"]) if role == "test")
        searched = sum(trial.generation > 0 for trial in store.trials())
    own = {(score.task, score.item): score.value for score in evaluation.items}
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        folder = Path(scratch) / "out"
        words = command("export", f"{study}/best", folder, "--weights", "--root", root)
        done = subprocess.run(words, cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"the export of {study}/best failed:\n{done.stderr[-4000:]}")
        found = scored_again(folder, own, include, Path(scratch) / "log")
    differ = sum(own[key] != found[key] for key in own)
    means = [sum(values[key] for key in own) / len(own) for values in (own, found)]
    return Exported(study, f"{best['origin']}, of {searched} candidates", *means, len(own), differ)


def scored_again(
    folder: Path, own: Mapping[tuple[str, str], float], include: Path, log: Path
) -> dict[tuple[str, str], float]:
    """(task, item) -> lm-eval's value, for the items that are in `own`."""
    tasks = sorted({task for task, _ in own})
    numbers = {}
    for task in tasks:
        rows = [
            json.loads(line) for line in next(include.rglob(f"{task}.test.jsonl")).read_text().splitlines()
        ]
        numbers[task] = [number for number, row in enumerate(rows) if (task, item_id(row)) in own]
    lm_eval_command.run(folder, DTYPE, numbers, include, log)
    found = {
        (task, item): value for task in tasks for item, value in lm_eval_command.values(log, task).items()
    }
    if found.keys() != own.keys():
        raise AssertionError(f"lm-eval scored other items: {sorted(found.keys() ^ own.keys())[:4]}")
    return found
