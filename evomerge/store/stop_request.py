"""The file by which another process asks a search to stop."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from evomerge.store.locks import Driver, driver

STOP = "stop"


# ---- a request to stop -------------------------------------------------------------------------------------------------


def ask_to_stop(store: Path) -> Driver | None:
    """Asks a study's driver to end, by a file beside the study that it looks for every second, on this machine or another.

    Returns the driver; None, and asks for nothing, where none runs. There is no signal: to the driver that would be a
    preemption, after which a batch system starts it again.
    """
    found = driver(store)
    if found is None or found.alive is False:
        return None
    request = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    beside = store.with_name(f"{STOP}.{os.getpid()}")
    beside.write_text(json.dumps(request))
    beside.replace(store.with_name(STOP))
    return found


def stop_requested(folder: Path) -> bool:
    """Whether `evomerge stop` has asked the driver of the study in that folder to end."""
    return (folder / STOP).exists()


def clear_stop(folder: Path) -> None:
    """Takes the request back: as a driver starts, and as it ends."""
    (folder / STOP).unlink(missing_ok=True)
