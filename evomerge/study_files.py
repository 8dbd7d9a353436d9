"""Where studies live on disk. Light: imported before anything heavy is."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from evomerge.errors import StudyError, suggest

STORE = "study.db"


def root(given: Path | None = None) -> Path:
    """Folder of the studies: `given`, else $EVOMERGE_ROOT, else results/ in the working directory."""
    return given or Path(os.environ.get("EVOMERGE_ROOT", "results"))


def studies(folder: Path) -> list[str]:
    """Names of the studies in a folder, sorted."""
    return sorted(file.parent.name for file in folder.glob(f"*/{STORE}"))


def store_path(study: str, folder: Path, *, new: bool = False) -> Path:
    """File of a study; raises StudyError for a name that is not one, or unless `new` that is not there."""
    if Path(study).name != study or study in ("", ".", ".."):
        raise StudyError(f"'{study}' is not the name of a study; use letters, digits, '.', '_' and '-'")
    path = folder / study / STORE
    if not new and not path.is_file():
        raise StudyError(f"there is no study '{study}' in {folder}/. {suggest(study, studies(folder))}")
    return path


def lock(path: Path) -> IO[str]:
    """An exclusive lock for as long as the file is open; the kernel drops it when the process dies. Raises StudyError where it is held."""
    handle = path.open("a+")
    for attempt in range(20):  # a reader that asks who drives holds it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.01 * (attempt < 19))
    else:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise StudyError(f"another process is writing {path.parent.name} ({holder}); stop it first, or choose another study name") from None
    handle.truncate(0)
    handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
    handle.flush()
    return handle
