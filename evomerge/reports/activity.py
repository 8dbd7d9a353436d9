"""Activity of a study as plain data: its driver, what its workers did, what failed, its last backup."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evomerge.store import Store, locks, paths, stop_request


def study_activity(store: Store) -> dict[str, Any]:
    """Collects driver, workers, failures by cause, runs, islands that a budget ended, and the last backup.

    Args:
        store: An open study.

    Returns:
        `driver`: host, pid and whether it is alive, None of that where it cannot be known from this machine;
        None where nobody ever drove the study. `stop_requested`: whether `evomerge stop` was asked.
        `workers`: what each did, with `busy` and `span` in seconds, `utilisation` in [0, 1] and times in Unix
        seconds; `utilisation`: of all together. `failures`: cause, number of attempts and last error. `runs`:
        of drivers. `ended`: stage, island and cause of a used-up budget. `backup`: path, time, age in seconds
        and size, None without one; `way_back`: how to go back to it, in words.
    """
    driver = locks.driver(store.path)
    workers = [asdict(use) | {"utilisation": use.utilisation} for use in store.activity.worker_uses()]
    busy = sum(worker["busy"] for worker in workers)
    span = sum(worker["span"] for worker in workers)
    failures = [
        {"cause": cause, "attempts": count, "last": error}
        for cause, count, error in store.activity.failures()
    ]
    ended = [
        {"stage": stage, "island": island, "cause": end.cause}
        for (stage, island), end in store.activity.ends().items()
    ]
    return {
        "driver": None if driver is None else asdict(driver),
        "stop_requested": stop_request.stop_requested(store.path.parent),
        "workers": workers,
        "utilisation": min(1.0, busy / span) if span else None,
        "failures": failures,
        "runs": [asdict(run) for run in store.activity.runs()],
        "ended": ended,
        "backup": _backup(store.path.with_name(paths.BACKUP)),
        "way_back": store.way_back(),
    }


def _backup(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    status = path.stat()
    age = max(0.0, time.time() - status.st_mtime)
    return {"path": str(path), "time": status.st_mtime, "age": age, "bytes": status.st_size}
