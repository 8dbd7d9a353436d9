"""Where studies live on disk, who drives them, and what is asked of a driver. Light: imported before anything heavy is."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.errors import StudyError, suggest

STORE = "study.db"
BACKUP = "study.backup.db"


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
