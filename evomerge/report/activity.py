"""What is going on in a study, as plain data: who drives it, what the workers did, what failed, how well it is kept."""

from __future__ import annotations

import time
from typing import Any

from evomerge import study_files
from evomerge.store import Store


def activity(store: Store) -> dict[str, Any]:
    """Driver, workers, failures by cause, runs, budgets that ended something, and the last backup.

    driver: None where nobody ever drove it; alive: None where that cannot be known from this machine. workers: busy and span
    in seconds, utilisation in [0, 1], times in Unix seconds. backup: None without one; age in seconds; way_back: to it, in words.
    """
    driver = study_files.driver(store.path)
    backup = store.path.with_name(study_files.BACKUP)
    workers: list[dict[str, Any]] = [
        {
            "worker": w.worker, "host": w.host, "device": w.device, "jobs": w.jobs, "busy": w.busy, "span": w.span,
            "utilisation": w.utilisation, "first": w.first, "last": w.last, "failures": dict(w.failures),
        }
        for w in store.workers()
    ]  # fmt: skip
    busy, span = sum(w["busy"] for w in workers), sum(w["span"] for w in workers)
    return {
        "driver": None if driver is None else {"host": driver.host, "pid": driver.pid, "alive": driver.alive},
        "stop_requested": study_files.stop_requested(store.path.parent),
        "workers": workers,
        "utilisation": min(1.0, busy / span) if span else None,
        "failures": [{"cause": cause, "attempts": count, "last": error} for cause, count, error in store.failures()],
        "runs": [{"host": r.host, "pid": r.pid, "started": r.started, "seconds": r.seconds} for r in store.runs()],
        "ended": [{"stage": stage, "island": island, "cause": cause} for (stage, island), cause in store.causes().items()],
        "backup": _backup(backup.stat().st_mtime, backup.stat().st_size, str(backup)) if backup.is_file() else None,
        "way_back": store.way_back(),
    }


def _backup(at: float, size: int, path: str) -> dict[str, Any]:
    return {"path": path, "time": at, "age": max(0.0, time.time() - at), "bytes": size}
