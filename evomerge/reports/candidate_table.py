"""Every candidate of a study as a row of plain values, written as CSV or Parquet."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, unwritable
from evomerge.store import Store, Trial

_SPREADSHEET = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula


def candidate_rows(store: Store) -> list[dict[str, Any]]:
    """Collects every candidate of a study.

    Args:
        store: An open study.

    Returns:
        A row for each trial, by generation and slot, all with the same keys: where it comes from, when it was
        scored (UTC), its scores, `task:NAME` for each metric, `cost:NAME`, `seconds`, and `gene:AXIS` for
        each coefficient of a first stage of weights, in the optimizer's own unit. None for nothing.
    """
    study, trials = store.study(), store.trials()
    times = store.usage.times()
    axes = () if study is None else study.facts.axes
    metrics = sorted({name for trial in trials for name in trial.metrics})
    costs = sorted({name for trial in trials for name in trial.costs})
    rows = []
    for trial in trials:
        genes = trial.genome if trial.genome is not None and len(trial.genome) == len(axes) else None
        rows.append(
            {
                **_origin(trial, times.get(trial.id)),
                **{f"task:{name}": trial.metrics.get(name) for name in metrics},
                **{f"cost:{name}": trial.costs.get(name) for name in costs},
                **{f"gene:{axis}": None if genes is None else genes[i] for i, axis in enumerate(axes)},
            }
        )
    return rows


def _origin(trial: Trial, time: float | None) -> dict[str, Any]:
    scored = None if time is None else datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
    return {
        "id": trial.id,
        "generation": trial.generation,
        "slot": trial.slot,
        "stage": trial.stage + 1,
        "island": trial.island + 1,
        "origin": trial.origin,
        "label": trial.label,
        "parents": " ".join(map(str, trial.parents)),
        "recipe": trial.recipe_id,
        "scored": scored,
        "objective": trial.reported,
        "ranked_by": trial.score,
        "violation": trial.violation,
        "dropped": trial.dropped,
        "error": trial.error,
        "seconds": sum(trial.seconds.values()),
    }


def write_candidates(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Writes rows into a file, which appears whole or not at all.

    In a CSV a text that a spreadsheet would compute is written with a ' before it.

    Args:
        rows: As `candidate_rows` gives them, at least one.
        file: Ends in .csv or .parquet.

    Raises:
        ConfigError: It ends in something else, or there is no row.
        EvomergeError: It cannot be written.
    """
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    suffix = file.suffix.lower()
    if suffix not in writers:
        raise ConfigError(f"'{file}' names no kind of table; end it with {' or '.join(writers)}")
    if not rows:
        raise ConfigError("the study has no candidate yet, so there is no table to write")
    part = file.with_name(f"{file.name}.part-{os.getpid()}")
    try:
        writers[suffix](rows, part)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(file, error) from None


def _write_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writerow({name: _cell(name) for name in rows[0]})
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_SPREADSHEET) else value


def _write_parquet(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = list(rows[0])
    columns = {name: [row[name] for row in rows] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
