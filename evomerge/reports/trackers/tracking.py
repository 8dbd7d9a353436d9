"""Runs a tracker beside a search, in a thread: one that raises, hangs or is missing costs a warning."""

from __future__ import annotations

import logging
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evomerge._escaping import one_line
from evomerge._redaction import scrub
from evomerge.reports.monitor import Update
from evomerge.reports.tally import Figures
from evomerge.reports.trackers.tracker import TRACKERS, Place, Tracker

log = logging.getLogger(__name__)
_SECONDS = 120.0  # that a call may take: a first start makes a database or calls a server
_LONGEST = 300  # characters of a warning's reason
_AT_END = 60.0  # seconds that a search waits at its end for what is not written yet


def open_tracking(name: str, place: Place) -> Tracking | None:
    """Makes the listener of a tracker.

    Args:
        name: A key of `TRACKERS`.
        place: Where the search is written to.

    Returns:
        The listener; None, after a warning, where the tracker's package is not installed.
    """
    kind = TRACKERS[name]
    if not kind.is_installed():
        log.warning(
            "the search is not written to %s: it is not installed; pip install %s", kind.title, kind.install
        )
        return None
    return Tracking(kind.title, lambda: kind.load()(), place)


@dataclass(slots=True)
class _Call:
    """A call that the thread is at. since: monotonic seconds; None while it waits for the next one."""

    since: float | None = None


class Tracking:
    """A listener that hands what happens to a tracker's thread and never waits for it but at the end.

    The thread is a daemon: one that hangs for good does not keep the process.
    """

    def __init__(
        self,
        title: str,
        make: Callable[[], Tracker],
        place: Place,
        *,
        seconds: float = _SECONDS,
        at_end: float = _AT_END,
    ) -> None:
        """Starts the thread, which makes the tracker and begins its run.

        Args:
            title: Name of the tracker in warnings.
            make: Makes the tracker.
            place: Where the search is written to.
            seconds: That a call of the tracker may take; then it is left out.
            at_end: Seconds that the end of the search waits for the tracker.
        """
        self._title, self._make, self._place = title, make, place
        self._seconds, self._at_end = seconds, at_end
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._call = _Call(time.monotonic())
        self._is_left_out = False
        self._lock = threading.Lock()
        self._scores: dict[int, list[float]] = {}
        self._thread = threading.Thread(target=self._run, name=f"tracker {title}", daemon=True)
        self._thread.start()

    def update(self, update: Update) -> None:
        """See `evomerge.reports.monitor.Listener`."""
        if self._is_left_out:
            return
        since = self._call.since
        if since is not None and time.monotonic() - since > self._seconds:
            self._leave_out(f"it has not answered for {self._seconds:g} s")
            return
        trial = update.trial
        if trial is not None and trial.reported is not None and trial.dropped is None:
            self._scores.setdefault(trial.generation, []).append(trial.reported)
        step = update.figures.evaluations
        if update.kind == "generation" and update.generation is not None:
            values = _values(update.figures, self._scores.pop(update.generation, []))
            self._calls.put(lambda tracker: tracker.log(step, values))
        elif update.kind == "best" and trial is not None:
            values = _finite({f"task/{name}": value for name, value in trial.metrics.items()})
            best = update.figures.best
            values |= {} if best is None else {"best": best.score}
            self._calls.put(lambda tracker: tracker.log(step, values))
        elif update.kind == "end":
            self._end(update)

    def _end(self, update: Update) -> None:
        results, text = _finite(update.results), scrub(update.text)
        self._calls.put(lambda tracker: tracker.finish(update.state, results, text))
        self._calls.put(None)
        self._thread.join(self._at_end)
        if self._thread.is_alive():
            self._leave_out(f"it was not ready {self._at_end:g} s after the end of the search")

    def _run(self) -> None:
        """The thread: one call after the other until the run is finished, or one fails."""
        try:
            tracker = self._make()
            tracker.start(self._place)
            while not self._is_left_out:
                self._call.since = None
                call = self._calls.get()
                self._call.since = time.monotonic()
                if call is None:
                    return
                call(tracker)
        except BaseException as error:  # a tracker may raise anything, SystemExit included
            self._leave_out(f"{type(error).__name__}: {error}")

    def _leave_out(self, reason: str) -> None:
        shown = one_line(scrub(reason))[:_LONGEST]
        with self._lock:
            if not self._is_left_out:
                log.warning("the search goes on without %s: %s", self._title, shown)
            self._is_left_out = True


def _values(figures: Figures, scores: list[float]) -> dict[str, float]:
    """The numbers of a generation."""
    values: dict[str, float | None] = {
        "generation": float(figures.generation),
        "failed": float(figures.failed),
        "gpu_hours": figures.gpu_hours,
        "cost": figures.cost,
        "candidates_per_hour": figures.rate,
        "lead": figures.lead,
        "lead_error": figures.lead_error,
    }
    if figures.best is not None:
        values |= {"best": figures.best.score, "best_error": figures.best.error}
    if scores:
        values |= {"generation_best": max(scores), "generation_median": statistics.median(scores)}
    return _finite(values)


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that trackers can draw."""
    return {
        name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)
    }
