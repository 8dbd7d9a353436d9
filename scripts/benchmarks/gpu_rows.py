"""Rows of scripts/benchmarks/gpu.py: written as they are measured, so that a run that is cut loses none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Rows:
    """A file of JSON lines, and the same as tables in Markdown, both whole after each row.

    Attributes:
        seconds_left: Until the time is up.
    """

    def __init__(self, out: Path, title: str, note: str, minutes: float, *, dry: bool = False) -> None:
        self.out, self.title, self.note, self.dry = out, title, note, dry
        self._start = time.perf_counter()
        self._end = self._start + 60 * minutes
        self._rows: list[dict[str, Any]] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")

    @property
    def seconds_left(self) -> float:
        return self._end - time.perf_counter()

    def add(self, part: str, what: str, **values: Any) -> None:
        """Adds a row; measured numbers are rounded as people read them, those of a dry run left out."""
        row: dict[str, Any] = {"part": part, "what": what}
        for key, value in values.items():
            row[key] = "–" if self.dry and isinstance(value, float) else _rounded(value)
        seconds = round(time.perf_counter() - self._start, 1)
        if not self.dry:
            row["at_s"] = seconds
        self._rows.append(row)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        whole = self.out.with_suffix(".tmp")
        whole.write_text(self.markdown())
        whole.replace(self.out.with_suffix(".md"))
        print(f"[{seconds:6.1f}] " + ", ".join(_cell(row, key) for key in row if key != "at_s"), flush=True)

    def markdown(self) -> str:
        """All rows so far, a table for each part."""
        lines = [f"# {self.title}", "", self.note]
        for part in dict.fromkeys(row["part"] for row in self._rows):
            rows = [row for row in self._rows if row["part"] == part]
            columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("part", "at_s")))
            lines += ["", f"## {part}", "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
            lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in rows]
        return "\n".join(lines) + "\n"


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if abs(value) < 1000 else round(value)


def _cell(row: dict[str, Any], key: str) -> str:
    return str(row[key]) if key in ("part", "what") else f"{key} {row[key]}"
