"""trackio: one run a study in a local database, which `trackio show` draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.reports.trackers.tracker import Place


class TrackioRuns:
    """Writes a run of the study's name; goes on with it when the study is resumed."""

    def __init__(self) -> None:
        self._run: Any = None
        self._step = 0

    def start(self, place: Place) -> None:
        """See `Tracker.start`."""
        import trackio

        self._step = place.first_step
        self._run = trackio.init(
            project=place.project,
            name=place.study,
            group=place.tags[0] if place.tags else None,
            config=dict(place.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._step = step
        self._run.log(dict(values), step=step)

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        """See `Tracker.finish`."""
        winner = {f"winner/{name}": value for name, value in results.items()}
        self._run.log({"state": state, "verdict": text, **winner}, step=self._step)
        self._run.finish()
