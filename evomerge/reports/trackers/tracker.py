"""What a tracker is, and which there are. Loads none of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Place:
    """Where a search is written to.

    Attributes:
        study: Name of the study, which is that of the run.
        folder: Of the study; trackers that write files write below it.
        project: Project of Weights & Biases or trackio, experiment of MLflow.
        entity: User or team of Weights & Biases; None for the user's own.
        tags: Of the run.
        settings: The search file as plain data, without secrets.
        first_step: Evaluations that are stored already; what a tracker has beyond them was broken off.
    """

    study: str
    folder: Path
    project: str = "evomerge"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0


class Tracker(Protocol):
    """Writes one search to a tracker. All calls come from one thread; any may raise or take long."""

    def start(self, place: Place) -> None:
        """Begins a run, or goes on with the one that this study began before.

        Args:
            place: Where to.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers.

        Args:
            step: Evaluations so far; never falls.
            values: Name -> finite number.
        """

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        """Ends the run.

        Args:
            state: 'done', 'paused' or 'failed'.
            results: Numbers of the winner by name; empty unless the search is done.
            text: The verdict, or why it ended.
        """


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """An entry of the registry.

    Attributes:
        title: As its makers write it.
        module: Module of the class.
        class_name: Name of the class, which is made without arguments.
        package: That it needs, as it is imported.
        install: What pip installs.
        writes_to: Where the run is found, in words.
    """

    title: str
    module: str
    class_name: str
    package: str
    install: str
    writes_to: str

    def is_installed(self) -> bool:
        """Whether its package is there; imports nothing."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ValueError:  # a module that stands for no package
            return False

    def load(self) -> Callable[[], Tracker]:
        """The class of the tracker."""
        made: Callable[[], Tracker] = getattr(importlib.import_module(self.module), self.class_name)
        return made


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(
        "TensorBoard",
        "evomerge.reports.trackers.tensorboard",
        "TensorBoard",
        "tensorboard",
        "tensorboard",
        "`trackers/tensorboard` in the study's folder",
    ),
    "wandb": TrackerKind(
        "Weights & Biases",
        "evomerge.reports.trackers.weights_and_biases",
        "WeightsAndBiases",
        "wandb",
        "wandb",
        "the server, or `trackers/wandb` in the study's folder without a key or a route, for `wandb sync`",
    ),
    "trackio": TrackerKind(
        "trackio",
        "evomerge.reports.trackers.trackio_runs",
        "TrackioRuns",
        "trackio",
        "trackio",
        "trackio's own folder, `$TRACKIO_DIR`",
    ),
    "mlflow": TrackerKind(
        "MLflow",
        "evomerge.reports.trackers.mlflow_runs",
        "MlflowRuns",
        "mlflow",
        "mlflow",
        "`$MLFLOW_TRACKING_URI`, else `trackers/mlflow.db` in the study's folder",
    ),
}
"""Name in the search file -> tracker."""
