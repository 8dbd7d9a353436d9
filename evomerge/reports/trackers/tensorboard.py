"""TensorBoard: scalars in event files of the study's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from evomerge.reports.trackers.tracker import Place


class TensorBoard:
    """Writes scalars, the search file and the verdict; `tensorboard --logdir` on the folder shows them."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._step = 0

    def start(self, place: Place) -> None:
        """See `Tracker.start`."""
        from torch.utils.tensorboard import SummaryWriter

        folder = place.folder / "trackers" / "tensorboard"
        purged = place.first_step + 1 if place.first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purged)
        self._step = place.first_step
        settings = json.dumps(place.settings, indent=2)
        self._writer.add_text("search", f"```json\n{settings}\n```", self._step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        """See `Tracker.finish`."""
        for name, value in results.items():
            self._writer.add_scalar(f"winner/{name}", value, self._step)
        self._writer.add_text("end", f"{state}: {text}" if text else state, self._step)
        self._writer.close()
