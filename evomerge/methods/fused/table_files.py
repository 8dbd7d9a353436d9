"""Tables of magnitudes in the user's cache folder: another process need not measure the parents again.

A file holds one table of one tensor of one parent and the base, named after the content hashes of the two
models. It is written beside and renamed, so that processes may share the folder, and holds a checksum: a file
that is damaged, cut short or of another table is as good as none. Whatever goes wrong with files makes a
search slower, never wrong.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import tempfile
import time
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomerge import _cache_folder

Array = np.ndarray[Any, np.dtype[Any]]
log = logging.getLogger(__name__)
_FORMAT = 1  # raised when what a table holds changes
_MOST_BYTES = 2 << 30  # of all files; the least recently used go first
_LARGEST = 1 << 20  # bytes of a file
_DAY = 86_400.0  # seconds after which a file that is read counts as used again
_DIGEST = hashlib.sha256().digest_size


class TableFiles:
    """The tables on disk of the models of a search.

    Attributes:
        folder: Where they are; None where no folder is this user's alone.
    """

    def __init__(self, content_hashes: Mapping[str, str], most_bytes: int = _MOST_BYTES) -> None:
        """Makes room for new tables.

        Args:
            content_hashes: Model -> hash of its content; tables of other models are not kept.
            most_bytes: Of all tables of all searches.
        """
        self._hashes = {name: digest for name, digest in content_hashes.items() if digest}
        self.folder = _cache_folder.subfolder("tables")
        self._room = 0
        if self.folder is not None:
            self._room = most_bytes - _make_room(self.folder, most_bytes // 2)

    def read(self, pair_id: Hashable, what: Sequence[Hashable]) -> list[Array] | None:
        """Reads a table.

        Args:
            pair_id: ((model, tensor), (base, tensor)).
            what: Which table.

        Returns:
            What was written; None where there is no such table or it is not whole.
        """
        key = self._key(pair_id, what)
        if key is None or self.folder is None:
            return None
        file = self.folder / f"{key}.table"
        try:
            if not _cache_folder.is_ours_alone(file, stat.S_ISREG) or file.stat().st_size > _LARGEST:
                return None
            data = file.read_bytes()
            if data[:_DIGEST] != _checksum(key, data[_DIGEST:]):
                log.debug("%s is damaged: measured again", file)
                return None
            with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as arrays:
                found = [arrays[name] for name in arrays.files]
            if time.time() - file.stat().st_mtime > _DAY:
                os.utime(file)
            return found
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            log.debug("no table from %s: %s", file, error)
            return None

    def write(self, pair_id: Hashable, what: Sequence[Hashable], arrays: Sequence[Array]) -> None:
        """Writes a table, if there is room and a folder for it.

        Args:
            pair_id: ((model, tensor), (base, tensor)).
            what: Which table.
            arrays: What it holds.
        """
        key = self._key(pair_id, what)
        if key is None or self.folder is None:
            return
        stream = io.BytesIO()
        np.savez(stream, *arrays)
        data = stream.getvalue()
        self._room -= len(data)
        if self._room < 0 or len(data) + _DIGEST > _LARGEST:
            return
        try:
            number, name = tempfile.mkstemp(dir=self.folder, suffix=".part")  # of mode 600
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(_checksum(key, data) + data)
                Path(name).replace(self.folder / f"{key}.table")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            log.debug("no table written to %s: %s", self.folder, error)
            self._room = 0  # the disk is full, or the folder gone

    def _key(self, pair_id: Hashable, what: Sequence[Hashable]) -> str | None:
        """Name of a table; None for one of models without a hash."""
        named: list[tuple[str, str]] = []
        for part in pair_id if isinstance(pair_id, tuple) else ():
            if not (isinstance(part, tuple) and len(part) == 2 and part[0] in self._hashes):
                return None
            named.append((self._hashes[part[0]], part[1]))
        if len(named) != 2:
            return None
        return hashlib.sha256(repr((_FORMAT, named, tuple(what))).encode()).hexdigest()[:40]


def _checksum(key: str, data: bytes) -> bytes:
    """Of a table under its name: a file that was renamed is not whole either."""
    return hashlib.sha256(key.encode() + data).digest()


def _make_room(folder: Path, most_bytes: int) -> int:
    """Removes what was left half-written a day ago, and the least recently used tables; bytes that stay."""
    found: list[tuple[float, int, str]] = []
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            is_left = path.endswith(".part") and time.time() - used > _DAY
            if total > most_bytes or is_left:
                Path(path).unlink(missing_ok=True)
                total -= size
    except OSError as error:  # such as a file that another process removed
        log.debug("%s is not tidied: %s", folder, error)
    return total
