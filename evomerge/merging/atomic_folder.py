"""Output folders that exist whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import SetupError


def check_new(directory: Path) -> None:
    """Raises SetupError if the directory exists."""
    if directory.exists():
        raise SetupError(f"{directory} exists; choose another folder or remove it")


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A folder to fill beside `directory`, renamed to it at the end; whatever is raised, nothing is left."""
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        staging.chmod(0o755)
        yield staging
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
