"""kill -9, ten times: the search that is left is, row by row, the one that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toy import REPO, command, environment, search_file, stored_rows

# A process with every library imported and nothing run: a search forked from it starts in a fraction of the time.
PREPARED = """
import os, sys
import evomerge.launch, evomerge.lm_harness, transformers.models.llama.modeling_llama
from evomerge.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["evomerge", *line.rstrip("\\n").split("\\t")]
        code = 1
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Prepared:
    """Starts searches from the prepared process."""

    def __init__(self, log: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", PREPARED, str(log)], cwd=REPO, env=environment(), stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def start(self, *words: object) -> int:
        """Starts `evomerge` and returns its pid."""
        self.stdin.write("\t".join(map(str, words)) + "\n")
        self.stdin.flush()
        return int(self.stdout.readline())

    def end(self) -> int:
        """Waits for the search started last; its exit code."""
        return int(self.stdout.readline())


def evaluations(store: Path) -> int:
    """Number of evaluations stored so far; 0 where there is no store yet."""
    try:
        connection = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)
    except sqlite3.Error:
        return 0
    try:
        return int(connection.execute("SELECT count(*) FROM evaluations").fetchone()[0])
    except sqlite3.Error:
        return 0
    finally:
        connection.close()


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_after(pid: int, store: Path, rows: int, seconds: float) -> None:
    """SIGKILL once that many more evaluations are stored and that much time has passed, or at the end of the process."""
    wanted = evaluations(store) + rows
    limit = time.monotonic() + 100
    while rows and evaluations(store) < wanted and alive(pid):
        assert time.monotonic() < limit, "the search hangs"
        time.sleep(0.005)
    time.sleep(seconds)
    if alive(pid):
        os.kill(pid, signal.SIGKILL)


def check(store: Path, before: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What is stored after a kill: whole, and what was there before is there still."""
    if not store.is_file():
        return before
    rows = stored_rows(store)
    for table in ("recipes", "item_sets", "evaluations", "trials"):
        assert rows.get(table, [])[: len(before.get(table, []))] == before.get(table, []), f"{table} lost rows"
    connection = sqlite3.connect(store)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    return rows


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_search_killed_ten_times_is_the_search_that_nobody_killed(tmp_path: Path) -> None:
    rng = random.Random(20)
    file = search_file(tmp_path, "killed", evaluations=24)
    pipe = subprocess.PIPE
    whole = subprocess.Popen(
        command("run", file, "--root", tmp_path / "whole"), cwd=REPO, env=environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )
    prepared = Prepared(tmp_path / "log")
    store = tmp_path / "parts" / "killed" / "study.db"
    words = ("run", file, "--resume", "--root", tmp_path / "parts")
    rows: dict[str, list[dict[str, Any]]] = {}
    killed = 0
    try:
        for _ in range(2):  # fresh from the command line, somewhere between the first import and the first candidates
            fresh = subprocess.Popen(command(*words), cwd=REPO, env=environment(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
            kill_after(fresh.pid, store, 0, rng.uniform(1, 9))
            _, err = fresh.communicate(timeout=100)
            assert fresh.returncode in (-signal.SIGKILL, 0), err
            killed += fresh.returncode == -signal.SIGKILL
            rows = check(store, rows)
        for turn in range(8):
            pid = prepared.start(*words)
            if turn % 4 == 0:  # before anything new is stored
                kill_after(pid, store, 0, rng.uniform(0.05, 1.5))
            else:
                kill_after(pid, store, rng.randrange(1, 20), rng.uniform(0, 0.06))
            code = prepared.end()
            assert code in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
            killed += code == -signal.SIGKILL
            rows = check(store, rows)
        prepared.start(*words)
        assert prepared.end() == 0, (tmp_path / "log").read_text()
        _, err = whole.communicate(timeout=100)
        assert whole.returncode == 0, err
    finally:
        for process in (whole, prepared.process):
            process.kill()
            process.wait()
    assert killed >= 8, "most kills hit a running search"
    assert "Traceback" not in (tmp_path / "log").read_text()
    final, unbroken = check(store, rows), stored_rows(tmp_path / "whole" / "killed" / "study.db")
    assert [t["generation"] for t in final["trials"]][-1] == 3
    assert {e["role"] for e in final["evaluations"]} == {"search", "validation", "test"}
    assert final.keys() == unbroken.keys()
    for table, found in final.items():
        assert found == unbroken[table], table
    assert (tmp_path / "parts" / "killed" / "report.md").read_text() == (tmp_path / "whole" / "killed" / "report.md").read_text()
