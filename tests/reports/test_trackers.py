"""Trackers beside a search: what each writes, and that none can end or delay it."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.reports.trackers import TRACKERS, Place, Tracking, open_tracking
from tests.support.screens import ENDED
from tests.support.tracked import tracked_search

GENERATION = replace(ENDED, generation=5)
RESULTS = {"test": 0.61, "nothing": float("nan")}
END = replace(ENDED, kind="end", state="done", text="a verdict", results=RESULTS)


class Recording:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, place: Place) -> None:
        self.calls.append(("start", place.study))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(values)))

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        self.calls.append(("finish", state, dict(results), text))


def tracking(make: Callable[[], Any], tmp_path: Path, **limits: float) -> Tracking:
    return Tracking("Fake", make, Place("demo", tmp_path), **limits)


def test_a_tracker_is_told_of_generations_and_the_end_at_evaluations(tmp_path: Path) -> None:
    recording = Recording()
    listener = tracking(lambda: recording, tmp_path)
    for update in (replace(ENDED, kind="candidate"), GENERATION, END):
        listener.update(update)
    start, log, finish = recording.calls
    assert start == ("start", "demo")
    assert log[:2] == ("log", 84)
    assert log[2]["best"] == 0.612
    assert log[2]["cost"] == 4.25
    assert finish == ("finish", "done", {"test": 0.61}, "a verdict"), "what is no number is left out"


def raising(*names: str) -> Callable[[], Any]:
    """A tracker that raises in some calls."""

    class Raising(Recording):
        pass

    def refuse(*arguments: object) -> None:
        raise SystemExit("token hf_abcdefghijklmnopqrstuvwxyz is refused")

    for name in names:
        setattr(Raising, name, refuse)
    return Raising


@pytest.mark.parametrize("call", ["__init__", "start", "log", "finish"])
def test_a_tracker_that_raises_costs_one_warning(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        listener = tracking(raising(call), tmp_path)
        for _ in range(3):
            listener.update(GENERATION)
        listener.update(END)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the search goes on without Fake: SystemExit" in caplog.text
    assert "hf_" not in caplog.text


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_hangs_costs_one_warning_and_no_waiting(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    class Hanging(Recording):
        pass

    setattr(Hanging, call, lambda *arguments: release.wait(600))
    with caplog.at_level(logging.WARNING):
        listener = tracking(Hanging, tmp_path, seconds=0.05, at_end=0.05)
        listener.update(GENERATION)
        time.sleep(0.2)
        listener.update(GENERATION)
        listener.update(END)
        listener.update(END)
    release.set()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the search goes on without Fake: it " in caplog.text


def test_a_tracker_that_is_not_installed_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert open_tracking("wandb", Place("demo", tmp_path)) is None
    assert "not written to Weights & Biases: it is not installed; pip install wandb" in caplog.text


def test_every_tracker_of_the_registry_has_the_protocols_methods() -> None:
    for kind in TRACKERS.values():
        made = kind.load()()
        assert all(callable(getattr(made, name)) for name in ("start", "log", "finish"))


# ---- the real packages, writing locally ----------------------------------------


def needs(package: str) -> None:
    if not TRACKERS[package].is_installed():
        pytest.skip(f"{package} is not installed; scripts/test_trackers has an environment with it")


def test_tensorboard_holds_the_generations_of_a_search_that_was_resumed(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = tracked_search("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "trial" / "trackers" / "tensorboard"))
    events.Reload()
    best = events.Scalars("best")
    assert {event.step for event in best} >= set(steps)
    assert [event.step for event in best] == sorted(event.step for event in best)
    assert [event.value for event in best] == sorted(event.value for event in best)
    assert events.Scalars("winner/test")[0].value == pytest.approx(steps[max(steps)], abs=1e-6)
    assert "search/text_summary" in events.Tags()["tensors"]


def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracked_search("wandb", tmp_path)
    runs = list((tmp_path / "trial" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2, "one for each run of the driver"
    written = b"".join(run.read_bytes() for run in runs)
    for name in (b"generation_median", b"winner/test", b"candidates_per_hour"):
        assert name in written


def test_trackio_holds_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    steps = tracked_search("trackio", tmp_path)
    assert SQLiteStorage.get_runs("evomerge") == ["trial"]
    rows = SQLiteStorage.get_logs("evomerge", "trial")
    assert {row["step"] for row in rows} >= set(steps)
    assert rows[-1]["winner/test"] == pytest.approx(steps[max(steps)])


def test_mlflow_holds_one_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    steps = tracked_search("mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'trial' / 'trackers' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("evomerge")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "best")
    assert {metric.step for metric in history} >= set(steps)
    assert run.data.metrics["winner/test"] == pytest.approx(steps[max(steps)])
    assert run.data.params["method"] == "ties"


def test_updates_of_a_search_reach_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws that the real packages are held to, of one that keeps what it is told."""
    recordings: list[Recording] = []

    def make() -> Recording:
        recordings.append(Recording())
        return recordings[-1]

    kind = replace(TRACKERS["tensorboard"], module=__name__, package="os")
    monkeypatch.setitem(TRACKERS, "fake", kind)
    monkeypatch.setattr(type(kind), "load", lambda self: make)
    steps = tracked_search("fake", tmp_path)
    first, second = recordings
    logged = [call[1] for call in (*first.calls, *second.calls) if call[0] == "log"]
    assert logged == sorted(logged)
    assert set(steps) <= set(logged)
    assert first.calls[-1][:2] == ("finish", "paused")
    state, results, _ = second.calls[-1][1:]
    assert state == "done"
    assert results["test"] == steps[max(steps)]
