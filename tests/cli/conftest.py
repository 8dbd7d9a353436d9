"""A verb in this process, and a finished study of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.command_line import Call
from tests.support.toy import REPO, in_process


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a verb in this process, from the root of the repository."""
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(REPO)
    return in_process


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A root of its own with the finished study 'small', and its search file."""
    return Path(shutil.copytree(finished, tmp_path / "root"))
