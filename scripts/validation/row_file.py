"""Rows of a long run, kept in a file as they are made, so that a run that was broken off goes on from there.

A file holds one JSON object a line. A last line that was cut off is not read, and is removed before the next
one is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(file: Path | None) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in _whole_lines(file.read_text())]


def append(file: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows at the end of a file; does nothing without one."""
    if file is None:
        return
    kept = _whole_lines(file.read_text()) if file.exists() else []
    new = [json.dumps(row) + "\n" for row in rows]
    if file.exists() and file.stat().st_size != sum(len(line.encode()) for line in kept):
        file.write_text("".join(kept))
    with file.open("a") as out:
        out.writelines(new)


def _whole_lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
