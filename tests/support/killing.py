"""Kills of a running search at a stored row, and what has to hold in its store after each."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.toy import Fork, count_rows, stored_rows


def running(process: Fork | subprocess.Popen[str]) -> bool:
    return process.alive() if isinstance(process, Fork) else process.poll() is None


def kill_after(
    process: Fork | subprocess.Popen[str], store: Path, rows: int, seconds: float, *, limit: float = 300
) -> None:
    """SIGKILL once that many more evaluations are stored and that much time has passed, or at the end of the
    process. limit: seconds after which it is said to hang.
    """
    wanted = count_rows(store, "evaluations") + rows
    end = time.monotonic() + limit
    while rows and count_rows(store, "evaluations") < wanted and running(process):
        assert time.monotonic() < end, "the search hangs"
        time.sleep(0.005)
    time.sleep(seconds)
    if running(process):
        os.kill(process.pid, signal.SIGKILL)


def check(store: Path, before: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What is stored after a kill: whole, and what was there before is there still."""
    if not store.is_file():
        return before
    rows = stored_rows(store)
    for table in ("recipes", "item_sets", "evaluations", "trials"):
        now = {json.dumps(row, sort_keys=True) for row in rows.get(table, [])}
        assert all(json.dumps(row, sort_keys=True) in now for row in before.get(table, [])), (
            f"{table} lost rows"
        )
    connection = sqlite3.connect(store)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    return rows
