"""What a resumed search prints: what is new, not the log of the run before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.toy import REPO, in_process, search_file


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.chdir(REPO)


def generations(err: str) -> list[int]:
    return [int(number) for number in re.findall(r"generation (\d+): ", err)]


def test_a_resume_does_not_print_the_nights_log_again(tmp_path: Path) -> None:
    file = search_file(tmp_path, "night", evaluations=12, population=4)
    code, _, err = in_process("run", file, "--root", tmp_path)
    assert code == 0, err
    assert generations(err) == [1, 2, 3]
    code, _, err = in_process("resume", "night", "--evaluations", "+4", "--root", tmp_path)
    assert code == 0, err
    assert generations(err) == [4]
    assert err.count("3 generations are in the store; the search goes on") == 1
    code, _, err = in_process("resume", "night", "--root", tmp_path)
    assert code == 0, err
    assert generations(err) == []
