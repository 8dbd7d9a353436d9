"""The file by which another process asks a search to stop."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from evomerge.store.locks import Driver, driver

STOP = "stop"


def ask_to_stop(store: Path) -> Driver | None:
    """Asks a study's driver to end, on any machine, by a file that it looks for every second.

    No signal is sent: to the driver that would be a preemption, after which a batch system starts it again.

    Args:
        store: The study's file.

    Returns:
        The driver; None, and nothing is asked, where none runs.
    """
    running = driver(store)
    if running is None or running.alive is False:
        return None
    request = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    beside = store.with_name(f"{STOP}.{os.getpid()}")
    beside.write_text(json.dumps(request), encoding="utf-8")
    beside.replace(store.with_name(STOP))
    return running


def stop_requested(folder: Path) -> bool:
    """Looks for a request to stop.

    Args:
        folder: Folder of a study.

    Returns:
        Whether `evomerge stop` has asked its driver to end.
    """
    return (folder / STOP).exists()


def clear_stop(folder: Path) -> None:
    """Removes a request to stop, as a driver starts and as it ends.

    Args:
        folder: Folder of a study.
    """
    (folder / STOP).unlink(missing_ok=True)
