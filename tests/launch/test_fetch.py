"""`evomerge fetch`: models of the Hub and data of tasks in one folder, with the Hub's functions replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from evomerge.checkpoints import locate
from evomerge.launch.fetch import ENVIRONMENT
from tests.support.command_line import Call, one_line
from tests.support.toy import REPO, in_process, llama

COMMITS = {"org/base": "0" * 40, "org/math": "a" * 40}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a verb in this process; what `fetch` sets of the libraries is put back."""
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.chdir(REPO)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for module, names in (
        (huggingface_hub.constants, ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")),
        (datasets.config, ("HF_CACHE_HOME", "HF_DATASETS_CACHE")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    return in_process


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A Hub with two models; gathers what is asked of it."""
    asked: list[tuple[str, str | None]] = []
    source = llama(tmp_path / "source", 0)

    def snapshot_download(
        repository: str, *, revision: str | None = None, cache_dir: Any = None, **_: Any
    ) -> str:
        asked.append((repository, revision))
        if repository not in COMMITS:
            raise LocalEntryNotFoundError("no such repository")
        cache = Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
        folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMITS[repository]
        if not folder.exists():
            shutil.copytree(source, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def search(folder: Path, models: dict[str, Any], **more: Any) -> Path:
    document = {
        "study": "far",
        "models": models,
        "base": "base",
        "method": "task_arithmetic",
        "tasks": [{"task": "zoo_lookup"}],
        "evaluation": {"splits": "declared"},
        **more,
    }
    file = folder / "search.yaml"
    file.write_text(json.dumps(document))
    return file


def test_models_and_data_are_brought_and_found_again(
    tmp_path: Path, hub: list[tuple[str, str | None]], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = search(tmp_path, {"base": {"path": "org/base", "revision": "v1"}, "math": "org/math"})
    to = tmp_path / "cache"
    code, out, err = call("fetch", file, "--to", to)
    assert code == 0, err
    assert hub == [("org/base", "v1"), ("org/math", None)]
    assert f"revision {COMMITS['org/math']}" in out
    assert "task zoo_lookup" in err
    assert f"export HF_HOME={to}" in out
    script = f'. "{to / ENVIRONMENT}"; echo "$HF_HOME $HF_HUB_OFFLINE $HF_DATASETS_OFFLINE"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(to), "1", "1"]
    assert list((to / "datasets").rglob("*.arrow")), "the task's data are in the folder"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(to / "hub"))
    assert locate("org/math").is_relative_to(to)
    assert call("fetch", file, "--to", to)[0] == 0, "a second time fetches what is there"


def test_adapters_are_brought_and_local_models_are_named(
    tmp_path: Path, hub: list[tuple[str, str | None]], call: Call
) -> None:
    local = llama(tmp_path / "mine", 1)
    file = search(tmp_path, {"base": str(local), "math": f"{local}+org/math"})
    code, out, err = call("fetch", file, "--to", tmp_path / "cache")
    assert code == 0, err
    assert hub == [("org/math", None)]
    assert out.count("is a folder here and is not copied") == 2


def test_what_is_not_there_offline_is_one_line(
    tmp_path: Path, hub: list[tuple[str, str | None]], call: Call
) -> None:
    file = search(tmp_path, {"base": "org/base", "math": "org/nobody"})
    code, _, err = call("fetch", file, "--to", tmp_path / "cache")
    assert code == 3
    line = one_line("\n".join(err.splitlines()[-1:]), "E200")
    assert "'org/nobody'" in line
    assert "machine with a network" in line


def test_task_folders_are_code_here_too(
    tmp_path: Path, hub: list[tuple[str, str | None]], call: Call
) -> None:
    (tmp_path / "tasks").mkdir()
    file = search(
        tmp_path,
        {"base": "org/base", "math": "org/math"},
        evaluation={"splits": "declared", "include": [str(tmp_path / "tasks")]},
    )
    code, _, err = call("fetch", file, "--to", tmp_path / "cache")
    assert code == 2
    assert "--allow-tasks" in one_line(err, "E100")
    assert hub == []


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, hub: list[tuple[str, str | None]], call: Call
) -> None:
    file = search(tmp_path, {"base": "org/base", "math": "org/math"})
    (tmp_path / "file").write_text("mine")
    code, _, err = call("fetch", file, "--to", tmp_path / "file" / "cache")
    assert code == 3
    one_line(err, "E200")
    assert (tmp_path / "file").read_text() == "mine"
