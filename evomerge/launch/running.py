"""Runs a prepared study to its end while the console, trackers and notifications listen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.errors import EvomergeError, Paused
from evomerge.reports import study_summary
from evomerge.reports.monitor import Listener, Monitor
from evomerge.search import Progress, Study
from evomerge.store import Outcome

_RESULTS = ("search", "validation", "test", "test_error")


def run_study(
    study: Study, listeners: Sequence[Listener], show: Callable[[Progress], None] | None = None
) -> Outcome:
    """Runs a study.

        study = prepare_study(load("demo"), Path("results"))
        with study.store, contextlib.closing(study.pool):
            run_study(study, [screen])

    Args:
        study: Ready to run.
        listeners: Told of every candidate, generation, new best and failure, and of the end.
        show: Called with the progress too; None for nothing.

    Returns:
        The outcome.

    Raises:
        EvomergeError: As `evomerge.search.Study.run`; listeners are told before.
    """
    monitor = Monitor(study.store, listeners)

    def shown(progress: Progress) -> None:
        if show is not None:
            show(progress)
        monitor.show(progress)

    study.show = shown
    try:
        outcome = study.run()
    except (Paused, KeyboardInterrupt) as stopped:
        monitor.end("paused", str(stopped) if isinstance(stopped, Paused) else "stopped by a signal")
        raise
    except Exception as error:
        known = isinstance(error, EvomergeError)
        monitor.end("failed", str(error) if known else f"{type(error).__name__}: {error}")
        raise
    data = study_summary(study.store, check=False)
    monitor.end("done", data["verdict"]["sentence"], _results(outcome.best))
    return outcome


def _results(best: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a winner's row."""
    return {name: float(best[name]) for name in _RESULTS if best.get(name) is not None}
