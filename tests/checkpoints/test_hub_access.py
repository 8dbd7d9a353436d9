"""The Hub that cannot be reached: asked once and briefly, and never a minute of retries."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest
import yaml

from evomerge.checkpoints import hub_access, locate
from evomerge.checkpoints.hub_access import work_offline_where_needed
from evomerge.errors import CheckpointError, TaskError
from evomerge.evaluation.lm_harness.load_errors import explained
from evomerge.evaluation.lm_harness.task_catalogue import TaskCatalogue


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment that has chosen nothing, in which the libraries go to the network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", *hub_access._PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    hub_access._unreachable.cache_clear()
    yield monkeypatch
    hub_access._unreachable.cache_clear()


@pytest.fixture
def refused(online: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The Hub is a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    return online


def is_offline() -> tuple[bool, bool]:
    return huggingface_hub.constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_changes_nothing(online: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert work_offline_where_needed() is None
    assert is_offline() == (False, False)


def test_a_hub_that_refuses_puts_the_libraries_offline(refused: pytest.MonkeyPatch) -> None:
    assert work_offline_where_needed() == "Connection refused"
    assert is_offline() == (True, True)


def test_a_hub_that_never_answers_is_not_waited_for(online: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def hang(*_: Any, **__: Any) -> socket.socket:
        let_go.wait()
        raise OSError("too late")

    online.setattr(hub_access, "SECONDS", 0.05)
    online.setattr(socket, "create_connection", hang)
    assert work_offline_where_needed() == "no answer within 0.05 s"
    assert is_offline() == (True, True)
    let_go.set()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HTTPS_PROXY"])
def test_who_has_chosen_is_not_asked(variable: str, refused: pytest.MonkeyPatch) -> None:
    refused.setenv(variable, "1" if "OFFLINE" in variable else "http://proxy:3128")
    assert work_offline_where_needed() is None
    assert is_offline() == (False, False)


def test_a_data_set_that_is_not_there_offline_was_a_dozen_retry_lines(
    refused: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = {
        "task": "far",
        "dataset_path": "nobody/no_such_data",
        "test_split": "test",
        "doc_to_text": "x",
        "doc_to_target": "y",
        "output_type": "generate_until",
    }
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(task))
    huggingface = logging.getLogger("huggingface_hub")
    refused.setattr(huggingface, "propagate", True)
    with pytest.raises(Exception) as caught, caplog.at_level(logging.INFO):  # noqa: PT011
        TaskCatalogue([tmp_path]).build("far")
    error = caught.value
    text = str(error) if isinstance(error, TaskError) else explained("far", error)
    assert "cannot be reached from here (Connection refused)" in text
    assert "evomerge fetch" in text
    assert "Retry" not in caplog.text


def test_a_model_that_is_not_there_offline_names_the_verb_that_brings_it(refused: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be reached from here.*evomerge fetch"):
        locate("nobody/no-such-model")


def test_tasks_of_files_ask_for_no_hub(refused: pytest.MonkeyPatch) -> None:
    TaskCatalogue([]).build("zoo_lookup")
    assert is_offline() == (False, False)
