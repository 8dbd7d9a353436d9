"""Where the files of studies are on disk. Loads nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.errors import StudyError, suggest

STORE = "study.db"
BACKUP = "study.backup.db"
EARLIER_BACKUP = "study.backup.earlier.db"
BEFORE_RETRY = "study.before-retry-{}.db"
_FILES = (STORE, BACKUP, EARLIER_BACKUP)


def first_bytes(file: Path) -> bytes:
    """Reads a small file beside a study's.

    Args:
        file: The file.

    Returns:
        Its first 256 bytes; nothing of what is no file, such as a pipe, which would be waited for.
    """
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as handle:
            return handle.read(256)
    except OSError:
        return b""


def root(given: Path | None = None) -> Path:
    """Chooses the folder of the studies.

    Args:
        given: What the user gave, None for nothing.

    Returns:
        `given`, else $EVOMERGE_ROOT, else results/ in the working directory.
    """
    return given or Path(os.environ.get("EVOMERGE_ROOT", "results"))


def studies(folder: Path) -> list[str]:
    """Lists the studies in a folder.

    Args:
        folder: Folder of the studies.

    Returns:
        Their names, sorted; those whose file is gone and whose backup is there too.
    """
    return sorted({file.parent.name for name in _FILES for file in folder.glob(f"*/{name}")})


def store_path(study: str, folder: Path, *, new: bool = False) -> Path:
    """Finds the file of a study.

    Args:
        study: Name of the study.
        folder: Folder of the studies.
        new: The file may be missing.

    Returns:
        Path of the file, which may be gone where its backup is not.

    Raises:
        StudyError: The name is none, or there is no such study.
    """
    if Path(study).name != study or study in ("", ".", ".."):
        raise StudyError(f"'{study}' is not the name of a study; use letters, digits, '.', '_' and '-'")
    path = folder / study / STORE
    if not new and not any(path.with_name(name).is_file() for name in _FILES):
        raise StudyError(f"there is no study '{study}' in {folder}/. {suggest(study, studies(folder))}")
    return path
