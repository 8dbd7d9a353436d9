"""Output folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import SetupError, unwritable


def check_new(directory: Path) -> None:
    """Checks that an output folder does not exist yet.

    Args:
        directory: The folder.

    Raises:
        SetupError: It exists.
    """
    if directory.exists():
        raise SetupError(f"{directory} exists; choose another folder or remove it")


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A context in which a new folder is filled.

    Args:
        directory: The folder to create; missing parent folders are created too.

    Yields:
        A folder beside it to fill, which is renamed to `directory` at the end; whatever is raised, nothing is
        left.

    Raises:
        SetupError: `directory` exists, or cannot be made.
        NoRoom: The disk is full.
    """
    check_new(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise unwritable(directory, error) from None
    try:
        staging.chmod(0o755)
        yield staging
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
