"""What plan says of disk, cluster and cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, total_bytes
from evomerge.cli import output
from evomerge.config import Config, loading
from evomerge.launch.expense import cluster_data, cost_data, disk_data
from tests.support.command_line import Call
from tests.support.toy import REPO, in_process, llama

ON_CPU = {"cards": None, "fits": True, "lines": []}
ON_CARDS = {"cards": "4 x 80 GB", "fits": True, "lines": [], "gpus": 2, "workers": 2}
WORK = {"item_evaluations": 100_000, "stages": [{"candidates": 100, "items": 1000}]}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def settings(**more: Any) -> Config:
    document = {
        "study": "x",
        "models": {"a": "x", "b": "y"},
        "base": "a",
        "method": "ties",
        "tasks": [{"task": "t"}],
        **more,
    }
    return loading.check(_yaml.parse(json.dumps(document), "file"))


def test_a_disk_without_room_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {"a": Checkpoint(llama(tmp_path / "a", 0))}
    roomy = disk_data(settings(), parents, WORK, tmp_path / "not" / "yet")
    assert roomy["warning"] == ""
    assert roomy["export"] == total_bytes(parents["a"])
    assert 3 * 40 * 100_000 < roomy["study"] < 3 * 60 * 100_000
    for free, words in ((10, "the study takes about"), (roomy["study"] + 1, "export with weights")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: Usage(10**12, 0, free))
        assert words in disk_data(settings(), parents, WORK, tmp_path)["warning"]


@pytest.mark.parametrize(
    ("cluster", "memory", "workers", "gpus"),
    [
        ({}, ON_CPU, 1, 0),
        ({"workers": 3}, ON_CPU, 3, 0),
        ({}, ON_CARDS, 2, 2),
        ({"ray": "auto"}, ON_CPU, None, None),
        ({"ray": "auto", "workers": 8, "gpus": 0.5}, ON_CPU, 8, 0.5),
    ],
)
def test_the_cluster_is_that_of_the_file(
    cluster: dict[str, Any], memory: dict[str, Any], workers: int | None, gpus: float | None
) -> None:
    found = cluster_data(settings(cluster=cluster), memory)
    assert (found["workers"], found["gpus"], found["ray"]) == (workers, gpus, cluster.get("ray"))


def test_cost_is_hours_of_gpus_times_their_price() -> None:
    priced = settings(budget={"price": 2.5, "cost": 100})
    found = cost_data(priced, cluster_data(priced, ON_CARDS), seconds=7200)
    assert found["hours"] == 1.0  # two workers
    assert found["gpu_hours"] == 4.0  # of two cards each
    assert found["cost"] == 10.0
    assert found["limits"] == {"cost": 100}
    unknown = cost_data(settings(), cluster_data(settings(), ON_CPU))
    assert (unknown["hours"], unknown["cost"]) == (None, None)
    assert "--probe" in unknown["lines"][0]
    elsewhere = settings(cluster={"ray": "auto"})
    assert cost_data(elsewhere, cluster_data(elsewhere, ON_CPU), seconds=7200)["hours"] is None


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.chdir(REPO)
    return in_process


def test_plan_was_silent_for_seconds_on_a_terminal(
    finished: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_is_terminal", lambda: True)
    code, out, err = call("plan", finished / "small.yaml", "--root", finished)
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0] == f"checking {finished / 'small.yaml'}"
    assert any(line.startswith("opening 4 models and 4 tasks") for line in lines)
    for start in ("memory: ", "cluster: this machine", f"disk: {finished}", "cost: "):
        assert any(line.startswith(start) for line in out.splitlines()), start
