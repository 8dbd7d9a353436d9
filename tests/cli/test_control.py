"""Looking at a study from beside it, and ending it: status, stop, doctor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore
from evomerge.store import NewTrial, Store, StudyFacts, stop_request
from tests.support.toy import REPO, command, environment, in_process, weight_space

ITEMS: Items = {"first": ("a", "b")}
SPACE = weight_space()


def add(store: Store, slot: int, error: str | None = None) -> None:
    """A trial of generation 1."""
    recipe = SPACE.decode([slot / 64] * len(SPACE.axes))
    scores = () if error else tuple(ItemScore("first", item, 0.5) for item in ITEMS["first"])
    evaluation = Evaluation(recipe.id, scores, {} if error else {"first": 0.5}, {}, error)
    store.add_trial(
        NewTrial(
            generation=1,
            slot=slot,
            origin="sampled",
            label=None,
            genome=(slot / 64,),
            parents=(),
            recipe=recipe,
            items=ITEMS,
            evaluation=evaluation,
            score=None if error else slot / 64,
        )
    )


def attempt(cause: str, worker: str, started: float, seconds: float, error: str | None = None) -> Attempt:
    return Attempt("r", 1, cause, error, worker, "node7", 42, "cuda:0", started, seconds)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Studies with one, 'trial', that two workers are at work on."""
    folder = tmp_path / "trial"
    folder.mkdir()
    with Store.open(folder / "study.db", write=True) as store:
        store.begin("trial", 3, "study: trial\n", {}, StudyFacts())
        for slot in range(4):
            add(store, slot, "it is broken" if slot == 3 else None)
        own = [
            attempt("done", "w0", 100.0, 9.0),
            attempt("died", "w1", 100.0, 4.0, "signal 9"),
            attempt("done", "w1", 106.0, 4.0),
        ]
        store.activity.add_attempts([*own, attempt("died", "w0", 109.0, 1.0, "signal 11")])
        store.activity.add_driven_seconds(5.0)
    return tmp_path


def status(root: Path, *words: object) -> dict[str, Any]:
    code, out, err = in_process("status", "trial", "--root", root, "--json", *words)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


# ---- status ----------------------------------------


def test_status_says_who_drives_what_workers_do_and_what_failed(root: Path) -> None:
    data = status(root)
    assert (data["state"], data["store"], data["backup"]) == ("interrupted", "ok", None)
    assert data["driver"] == {"host": socket.gethostname(), "pid": os.getpid(), "alive": False}
    first, second = data["workers"]
    assert (first["worker"], first["host"], first["device"], first["jobs"], first["busy"]) == (
        "w0",
        "node7",
        "cuda:0",
        1,
        10.0,
    )
    assert (first["utilisation"], second["utilisation"], data["utilisation"]) == (1.0, 0.8, 0.9)
    assert (first["failures"], second["failures"]) == ({"died": 1}, {"died": 1})
    assert data["failures"] == [{"cause": "died", "attempts": 2, "last": "signal 11"}]
    assert [(r["host"], r["pid"], r["seconds"]) for r in data["runs"]] == [
        (socket.gethostname(), os.getpid(), 5.0)
    ]
    code, out, _ = in_process("status", "trial", "--root", root)
    assert code == 0
    assert "driver: none (the last was host" in out
    assert "go on with: evomerge resume trial" in out
    assert "store ok" in out
    assert "90 % busy in all" in out
    assert "2 attempts died, the last: signal 11" in out
    assert "backup: none yet" in out


def test_status_beside_a_driver_names_it_and_its_backup(root: Path) -> None:
    file = root / "trial" / "study.db"
    with Store.open(file, write=True) as store:
        copy = store.backup()
        store.activity.set_end(0, 1, 4, "the budget of 2 hours is used up")
        stop_request.ask_to_stop(file)
        data = status(root)
        out = in_process("status", "trial", "--root", root)[1]
    assert (data["state"], data["driver"]["alive"], data["stop_requested"]) == ("running", True, True)
    assert data["backup"]["path"] == str(copy)
    assert data["backup"]["bytes"] == copy.stat().st_size
    assert 0 <= data["backup"]["age"] < 600
    assert data["ended"] == [{"stage": 0, "island": 1, "cause": "the budget of 2 hours is used up"}]
    assert f"driver: host {socket.gethostname()}, pid {os.getpid()}, asked to stop" in out
    assert "stage 1, island 2 ended early: the budget of 2 hours is used up" in out
    assert f"backup: {copy}" in out


def test_status_of_a_damaged_store_names_the_damage_and_the_way_back(root: Path) -> None:
    file = root / "trial" / "study.db"
    with Store.open(file, write=True) as store:
        store.backup()
    content = file.read_bytes()
    place = content.index(b"[0.5, 0.5]")  # scores of an item
    file.write_bytes(content[:place] + b"[0.5, 0.6]" + content[place + 10 :])
    data = status(root)
    assert "is not what was stored" in data["store"]
    assert "cp study.backup.db study.db" in data["way_back"]
    out = in_process("status", "trial", "--root", root)[1]
    assert "the store is damaged: its backup is" in out


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail(f"'{text}' never came: {lines}")


@pytest.fixture
def watching(root: Path) -> Iterator[subprocess.Popen[str]]:
    words = command("status", "trial", "--root", root, "--watch", "--every", "0.1")
    kept = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so do its children
    process = subprocess.Popen(
        words, cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, kept)
    yield process
    process.kill()
    process.communicate()


def test_watch_shows_what_comes_until_it_is_ended(root: Path, watching: subprocess.Popen[str]) -> None:
    read_until(watching, " 4 evaluations in 1 generations")
    with Store.open(root / "trial" / "study.db", write=True) as store:
        add(store, 4)
        read_until(watching, " 5 evaluations in 1 generations")
        read_until(watching, f"driver: host {socket.gethostname()}, pid {os.getpid()}")
    read_until(watching, "driver: none")
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (0, "")


# ---- stop ----------------------------------------


def test_a_stop_waits_for_the_driver_to_end(root: Path) -> None:
    file = root / "trial" / "study.db"
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # a driver: looks for the request, notes that it was stopped, and ends
        try:
            with Store.open(file, write=True) as store:
                os.write(writing, b".")
                limit = time.monotonic() + 60
                while not stop_request.stop_requested(file.parent) and time.monotonic() < limit:
                    time.sleep(0.01)
                store.set_state("paused")
        finally:
            os._exit(0)
    os.read(reading, 1)
    try:
        code, out, err = in_process("stop", "trial", "--wait", "--root", root)
    finally:
        os.waitpid(pid, 0)
        os.close(reading), os.close(writing)
    assert code == 0, err
    assert out.splitlines() == [
        f"trial: asked the driver to stop (host {socket.gethostname()}, pid {pid})",
        "trial: paused",
    ]
    assert not stop_request.stop_requested(file.parent)


def test_a_stop_of_a_study_that_nobody_drives_says_so(root: Path) -> None:
    assert in_process("stop", "trial", "--root", root) == (
        0,
        "trial: no driver runs it, there is nothing to stop\n",
        "",
    )
    assert not stop_request.stop_requested(root / "trial")
    code, _, err = in_process("stop", "trail", "--root", root)
    assert code == 2
    assert "Did you mean 'trial'?" in err


# ---- doctor ----------------------------------------


def test_doctor_finds_this_environment_fit(tmp_path: Path) -> None:
    root = tmp_path / "none" / "yet"
    code, out, err = in_process("doctor", "--root", root, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["problems"] == []
    assert all(row["fits"] for row in found["packages"] if not row["extra"])
    assert {"torch", "transformers", "lm-eval", "safetensors"} <= {row["name"] for row in found["packages"]}
    extras = {"", "ray", "plots", "gguf", "vllm", "dashboard", "optuna", "trackers"}
    assert {row["extra"] for row in found["packages"]} == extras
    assert found["devices"][0]["name"] == "cpu"
    assert found["studies"]["root"] == str(root)
    assert found["studies"]["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert (found["studies"]["writable"], found["studies"]["locks"]) == ("yes", "yes")
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert not root.exists(), "it only looks"
    out = in_process("doctor", "--root", root)[1]
    assert out.endswith("ready\n")
    assert "not ready" not in out


def test_doctor_names_what_keeps_a_search_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_JOURNAL", "none")
    code, out, _ = in_process("doctor", "--root", tmp_path)
    assert code == 3
    assert "problem: $EVOMERGE_JOURNAL must be WAL or DELETE, got 'NONE'" in out
    assert out.endswith("not ready\n")
