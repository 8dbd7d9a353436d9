"""What is going on in a study, as plain data: who drives it, what the workers did, what failed, how well it is kept."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from evomerge.store import Store, locks, paths, stop_request


def activity(store: Store) -> dict[str, Any]:
    """Driver, workers, failures by cause, runs, budgets that ended something, and the last backup.

    driver: None where nobody ever drove it; alive: None where that cannot be known from this machine. workers: busy and span
    in seconds, utilisation in [0, 1], times in Unix seconds. backup: None without one; age in seconds; way_back: to it, in words.
    """
    driver = locks.driver(store.path)
    backup = store.path.with_name(paths.BACKUP)
    workers: list[dict[str, Any]] = [asdict(w) | {"utilisation": w.utilisation} for w in store.workers()]
    busy, span = sum(w["busy"] for w in workers), sum(w["span"] for w in workers)
    return {
        "driver": None if driver is None else asdict(driver),
        "stop_requested": stop_request.stop_requested(store.path.parent),
        "workers": workers,
        "utilisation": min(1.0, busy / span) if span else None,
        "failures": [
            {"cause": cause, "attempts": count, "last": error} for cause, count, error in store.failures()
        ],
        "runs": [asdict(r) for r in store.runs()],
        "ended": [
            {"stage": stage, "island": island, "cause": cause}
            for (stage, island), cause in store.causes().items()
        ],
        "backup": _backup(backup.stat().st_mtime, backup.stat().st_size, str(backup))
        if backup.is_file()
        else None,
        "way_back": store.way_back(),
    }


def _backup(at: float, size: int, path: str) -> dict[str, Any]:
    return {"path": path, "time": at, "age": max(0.0, time.time() - at), "bytes": size}
