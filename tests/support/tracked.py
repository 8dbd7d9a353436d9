"""A small search that is stopped and resumed while a tracker listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import Paused
from evomerge.launch.running import run_study
from evomerge.reports.trackers import Place, open_tracking
from evomerge.search import Study
from evomerge.store import Store, StudyFacts
from tests.support.toy import ToyPool
from tests.support.toy_search import plan

FIRST_STOP = 20  # evaluations, parents and hand recipes among them


def tracked_search(tracker: str, folder: Path) -> dict[int, float]:
    """Runs a search of three generations of six candidates, which is stopped in the third.

    Args:
        tracker: A key of `evomerge.reports.trackers.TRACKERS`.
        folder: Root of the study 'trial'.

    Returns:
        Evaluations at the end of each generation -> the winner's score on test items.
    """
    file = folder / "trial" / "study.db"
    file.parent.mkdir()
    with pytest.raises(Paused):
        _run(tracker, file, stop_at=FIRST_STOP)
    outcome = _run(tracker, file, stop_at=None)
    return dict.fromkeys((6, 12, 18), float(outcome))


def _run(tracker: str, file: Path, stop_at: int | None) -> float:
    studies: list[Study] = []

    def stop(made: int) -> None:
        if made == stop_at:
            studies[0].dispatch.request_stop()

    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        first = store.usage.searched(0)
        settings = {"method": "ties", "search": {"seed": 5}}
        tracking = open_tracking(tracker, Place("trial", file.parent, settings=settings, first_step=first))
        assert tracking is not None
        studies.append(Study(plan(), store, ToyPool(before=stop)))
        outcome = run_study(studies[0], [tracking])
        return float(outcome.best["test"])
