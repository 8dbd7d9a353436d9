"""kill -9, again and again: the search that is left is, row by row, the one that nobody killed."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.killing import check, kill_after
from tests.support.sweeps import sweep
from tests.support.toy import REPO, Prepared, command, environment, search_file, stored_rows


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("fresh_starts", "restarts"), sweep([(1, 2), (2, 8)], [(1, 2)]))
def test_a_search_killed_again_and_again_is_the_search_that_nobody_killed(
    fresh_starts: int, restarts: int, tmp_path: Path
) -> None:
    rng = random.Random(20)
    file = search_file(tmp_path, "killed", evaluations=24)
    store = tmp_path / "parts" / "killed" / "study.db"
    words = ("run", file, "--resume", "--root", tmp_path / "parts")
    rows: dict[str, list[dict[str, Any]]] = {}
    killed, pipe = 0, subprocess.PIPE
    with Prepared(tmp_path) as prepared:
        # fresh from the command line, somewhere between the first import and the first candidates
        for _ in range(fresh_starts):
            fresh = subprocess.Popen(
                command(*words),
                cwd=REPO,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            kill_after(fresh, store, 0, rng.uniform(1, 5))
            _, err = fresh.communicate(timeout=100)
            assert fresh.returncode in (-signal.SIGKILL, 0), err
            killed += fresh.returncode == -signal.SIGKILL
            rows = check(store, rows)
        whole = prepared.start("run", file, "--root", tmp_path / "whole")
        for turn in range(restarts):
            search = prepared.start(*words)
            if turn % 4 == 0:  # before anything new is stored
                kill_after(search, store, 0, rng.uniform(0.05, 1.5))
            else:
                kill_after(search, store, rng.randrange(1, 20), rng.uniform(0, 0.06))
            code = search.wait()
            assert code in (-signal.SIGKILL, 0), search.err.read_text()
            assert "Traceback" not in search.err.read_text()
            killed += code == -signal.SIGKILL
            rows = check(store, rows)
        last = prepared.start(*words)
        assert last.wait() == 0, last.err.read_text()
        assert whole.wait() == 0, whole.err.read_text()
    assert killed >= 0.8 * (fresh_starts + restarts), "most kills hit a running search"
    final, unbroken = check(store, rows), stored_rows(tmp_path / "whole" / "killed" / "study.db")
    assert [t["generation"] for t in final["trials"]][-1] == 3
    assert {e["role"] for e in final["evaluations"]} == {"search", "validation", "test"}
    assert final.keys() == unbroken.keys()
    for table, found in final.items():
        assert found == unbroken[table], table
    assert (tmp_path / "parts" / "killed" / "report.md").read_text() == (
        tmp_path / "whole" / "killed" / "report.md"
    ).read_text()
