"""A study as a database of optuna, which optuna-dashboard and optuna's own plots open."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from evomerge.errors import NothingToExport, SetupError, unwritable
from evomerge.reports.panels.beliefs import recipe_table
from evomerge.store import Store, Trial

_SKIPPED = ("learned",)  # steps of gradient descent have no score


def export_optuna(store: Store, file: Path) -> int:
    """Writes a study as an SQLite database of optuna, by optuna's own API.

    A trial has the objective as its value, how much of each model it takes by layers and component as its
    parameters, and the metrics of its tasks, its recipe and origin as attributes. A candidate that failed is
    FAIL, one that a race dropped is PRUNED.

    Args:
        store: An open study.
        file: Database to make, which appears whole or not at all.

    Returns:
        How many trials it has.

    Raises:
        SetupError: optuna is not installed, or the file exists.
        NothingToExport: The study has no candidate yet.
    """
    optuna = _optuna()
    if file.exists():
        raise SetupError(f"{file} exists; remove it, or choose another name")
    study = store.study()
    trials = [trial for trial in store.trials() if trial.origin not in _SKIPPED]
    if study is None or not trials:
        raise NothingToExport(f"{store.path.parent.name} has no candidate yet, so there is nothing to export")
    params = _parameters(store, trials)
    ranges = _ranges(params)
    times = store.usage.times()
    frozen = [
        _frozen(optuna, number, trial, params.get(trial.id, {}), ranges, times.get(trial.id, 0.0))
        for number, trial in enumerate(trials)
    ]
    part = file.with_name(f"{file.name}.part-{os.getpid()}")
    try:
        _write(optuna, part, study.name, frozen)
        part.replace(file)
    except OSError as error:
        raise unwritable(file, error) from None
    finally:
        part.unlink(missing_ok=True)
    return len(frozen)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SetupError(
            "--to optuna needs optuna, which is not installed; pip install 'evomerge[optuna]'"
        ) from None
    return optuna


def _write(optuna: Any, file: Path, name: str, trials: list[Any]) -> None:
    """Makes the database."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}")
        made = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        made.add_trials(trials)
        storage.engine.dispose()
    finally:
        optuna.logging.set_verbosity(before)


def _parameters(store: Store, trials: list[Trial]) -> dict[int, dict[str, float]]:
    """Id of a trial -> 'layers component, model' -> coefficient."""
    models, names, rows = recipe_table({trial.id: store.recipe(trial.recipe_id) for trial in trials})
    return {
        trial_id: {
            f"{name}, {model}": value
            for name, row in zip(names, of, strict=True)
            if row is not None
            for model, value in zip(models, row, strict=True)
        }
        for trial_id, of in rows.items()
    }


def _ranges(params: Mapping[int, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Parameter -> (least, greatest) value of all trials."""
    ranges: dict[str, tuple[float, float]] = {}
    for of in params.values():
        for name, value in of.items():
            low, high = ranges.get(name, (value, value))
            ranges[name] = (min(low, value), max(high, value))
    return ranges


def _frozen(
    optuna: Any,
    number: int,
    trial: Trial,
    params: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    time: float,
) -> Any:
    """A trial of optuna."""
    states = optuna.trial.TrialState
    value = trial.reported
    if value is None or not math.isfinite(value):
        state, value = states.FAIL, None
    else:
        state = states.PRUNED if trial.dropped is not None else states.COMPLETE
    attributes: dict[str, Any] = {
        "evomerge id": trial.id,
        "generation": trial.generation,
        "origin": trial.origin,
        "recipe": trial.recipe_id,
        **{f"task {task}": metric for task, metric in trial.metrics.items() if math.isfinite(metric)},
    }
    attributes |= {} if trial.label is None else {"label": trial.label}
    attributes |= {} if trial.error is None else {"error": trial.error[:1000]}
    return optuna.trial.FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=value,
        datetime_start=datetime.fromtimestamp(time - sum(trial.seconds.values())),
        datetime_complete=datetime.fromtimestamp(time),
        params=dict(params),
        distributions={name: optuna.distributions.FloatDistribution(*ranges[name]) for name in params},
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={} if value is None else {trial.generation: value},
    )
