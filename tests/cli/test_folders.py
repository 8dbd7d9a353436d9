"""The folder of a study, from outside: gone, renamed, copied, without rights, with what others put there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.store import Store, paths
from tests.support.toy import REPO, in_process, stored_rows

Call = Callable[..., tuple[int, str, str]]


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


def one_line(err: str, code: str) -> str:
    """The only line of an error; dated lines are progress."""
    lines = [line for line in err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"error[{code}] "), err
    return lines[0]


# ---- a store that is gone ----------------------------------------------------------------------------------


def test_a_store_that_is_gone_is_refused_by_every_verb(root: Path, call: Call) -> None:
    folder = root / "small"
    with Store.open(folder / "study.db", write=True) as store:
        store.backup()
    before = stored_rows(folder / paths.BACKUP)
    (folder / "study.db").unlink()
    verbs = (
        ("run", root / "small.yaml", "--resume"),
        ("run", root / "small.yaml"),
        ("resume", "small"),
        ("status", "small"),
        ("show", "small/best"),
    )
    for words in verbs:
        code, out, err = call(*words, "--root", root)
        assert (code, out) == (2, ""), err
        line = one_line(err, "E300")
        assert "study.db is gone" in line
        assert f"cp {paths.BACKUP} study.db" in line
    code, out, err = call("status", "--root", root)
    assert code == 0
    assert "study.db is gone" in one_line(err, "E300")
    assert stored_rows(folder / paths.BACKUP) == before
    assert not (folder / "study.db").exists()
