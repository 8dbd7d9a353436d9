"""MLflow: one run a study, in the database of the study's folder unless a server is named."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.reports.trackers.tracker import Place

_STATUS = {"done": "FINISHED", "paused": "KILLED", "failed": "FAILED"}
_LONGEST = 500  # characters of a parameter
_STUDY_TAG = "evomerge.study"


class MlflowRuns:
    """Writes a run of the study's name; goes on with it when the study is resumed."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run = ""
        self._step = 0

    def start(self, place: Place) -> None:
        """See `Tracker.start`."""
        from mlflow import MlflowClient

        folder = place.folder.absolute() / "trackers"
        folder.mkdir(exist_ok=True)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}")
        self._step = place.first_step
        known = self._client.get_experiment_by_name(place.project)
        if known is None:
            artifacts = None if server else (folder / "mlflow").as_uri()
            experiment = self._client.create_experiment(place.project, artifacts)
        else:
            experiment = known.experiment_id
        named = f"tags.`{_STUDY_TAG}` = '{place.study}'"
        runs = self._client.search_runs([experiment], named, max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {_STUDY_TAG: place.study, **dict.fromkeys(place.tags, "true")}
        self._run = self._client.create_run(experiment, tags=tags, run_name=place.study).info.run_id
        for name, value in _flat(place.settings, ""):
            self._client.log_param(self._run, name, str(value)[:_LONGEST])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._step = step
        now = int(time.time() * 1000)
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, now, step)

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        """See `Tracker.finish`."""
        self.log(self._step, {f"winner/{name}": value for name, value in results.items()})
        self._client.set_tag(self._run, "verdict", text)
        self._client.set_terminated(self._run, _STATUS.get(state, "FINISHED"))


def _flat(settings: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of plain data."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif settings is not None:
        yield path, settings
