"""The user's cache folder: what is compiled or computed once, in files that nobody else could write."""

from __future__ import annotations

import functools
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def ours() -> tuple[Path, bool]:
    """The folder `evomerge` in the user's cache, where no one else can write there or above.

    Returns:
        (the folder, whether nobody else could have written what it holds); a new one for this process, and
        False, where there is no such folder.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not home.is_absolute():
            raise PermissionError(f"{home} is no absolute path")
        folder = home / "evomerge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve()
        if not all(_is_safe_above(above) for above in folder.parents):
            raise PermissionError(f"others can write above {folder}")
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to someone else")
        is_trusted = is_ours_alone(folder, stat.S_ISDIR)
        folder.chmod(0o700)
        return folder, is_trusted
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        log.debug("no cache folder: %s", error)
        return Path(_private_folder().name), False


def subfolder(name: str) -> Path | None:
    """A folder of one kind of files in the user's cache.

    Args:
        name: Its name.

    Returns:
        The folder, made if it is not there; None where there is none that nobody else could have written.
    """
    above, is_trusted = ours()
    if not is_trusted:
        return None
    folder = above / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        log.debug("no folder %s: %s", folder, error)
        return None
    return folder if is_ours_alone(folder, stat.S_ISDIR) else None


def read_json(file: Path, most_bytes: int) -> Any:
    """Reads a file of the user's cache.

    Args:
        file: The file.
        most_bytes: Size above which it is not read.

    Returns:
        What it holds; None where it is not there, no JSON, too large, or not of this user alone.
    """
    try:
        if not is_ours_alone(file, stat.S_ISREG) or file.stat().st_size > most_bytes:
            return None
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        log.debug("nothing read from %s: %s", file, error)
        return None


def write_json(file: Path, data: object) -> None:
    """Writes a file of the user's cache, whole or not at all; a failure is only logged.

    Args:
        file: The file, in a folder that exists.
        data: What JSON can hold.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
            json.dump(data, stream)
        Path(stream.name).replace(file)
    except OSError as error:
        log.debug("nothing written to %s: %s", file, error)


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process alone, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="evomerge-")


def is_ours_alone(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a file or folder is there, no link, and this user's, and no one else can write it.

    Args:
        path: The file or folder.
        is_kind: Says of a mode whether it is of the kind, such as `stat.S_ISREG`.

    Returns:
        True if it is.
    """
    try:
        status = path.lstat()
    except OSError:
        return False
    has_one_name = stat.S_ISDIR(status.st_mode) or status.st_nlink == 1
    is_closed = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return is_kind(status.st_mode) and has_one_name and is_closed


def _is_safe_above(folder: Path) -> bool:
    """Whether no one but root, this user and his own group can rename what a folder holds."""
    status = folder.stat()
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    others = 0o002 if status.st_gid == os.getgid() else 0o022
    return status.st_uid in (0, os.getuid()) and (is_sticky or not status.st_mode & others)
