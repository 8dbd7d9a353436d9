"""What a panel of the dashboard and the HTML report is: plain data for a chart, and tables of the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["text", "score", "signed", "count", "percent", "seconds", "interval", "candidate"]
"""How a cell is written: a score with three decimals, a difference with its sign, a duration and so on."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        label: Its heading.
        kind: How its cells are written.
    """

    label: str
    kind: Kind = "text"

    @property
    def is_number(self) -> bool:
        """Whether cells stand on the right."""
        return self.kind not in ("text", "candidate")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a panel.

    Attributes:
        caption: What its rows are, in words.
        columns: Its columns.
        rows: One cell for each column in each row; None for nothing.
        marked: Numbers of the rows that are marked, such as the winner's.
        alarms: Numbers of the rows that a reader should look at.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    marked: tuple[int, ...] = ()
    alarms: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of the page.

    Attributes:
        id: Its name in addresses.
        title: Its heading.
        caption: A sentence that says how to read it.
        chart: Plain data that the page's script draws; None where there is nothing to draw.
        tables: The same as numbers, which are read without a script.
        note: Why there is nothing, or what a reader should know; '' for nothing.
    """

    id: str
    title: str
    caption: str
    chart: Mapping[str, Any] | None = None
    tables: tuple[Table, ...] = ()
    note: str = ""

    def to_plain(self) -> dict[str, Any]:
        """The panel as mappings, lists and scalars."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the head of the page.

    Attributes:
        label: What it is.
        value: The number as text.
        detail: A second line, '' for none.
        tone: 'good' or 'bad' where it is news, else ''.
    """

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    """The head of the page.

    Attributes:
        study: Name of the study.
        state: 'running', 'interrupted', 'paused', 'failed', 'done' or 'empty'.
        verdict: One sentence: what was found, or how far it has come.
        tiles: The numbers.
        warnings: Sentences on what a reader should know before trusting the numbers.
        progress: Share of the budget that is used, in [0, 1]; None where it is not known.
        facts: (name, value) pairs on how the study was made.
    """

    study: str
    state: str
    verdict: str
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    progress: float | None = None
    facts: tuple[tuple[str, str], ...] = field(default_factory=tuple)

    def to_plain(self) -> dict[str, Any]:
        """The head as mappings, lists and scalars."""
        return asdict(self)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number for a chart.

    Args:
        value: Any number, or None.
        digits: Decimals to keep.

    Returns:
        The rounded number; None for None and for what is not finite.
    """
    if value is None or not math.isfinite(value):
        return None
    return round(value, digits) + 0.0


def duration(seconds: float) -> str:
    """Writes a time.

    Args:
        seconds: At or above 0.

    Returns:
        Such as '45 s', '12 min', '3 h 20 min' or '2 d 4 h'.
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def cell(value: Any, kind: Kind) -> str:
    """Writes a cell of a table.

    Args:
        value: The cell.
        kind: How it is written.

    Returns:
        Text; '–' for nothing.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if kind == "interval":
        low, high = value
        return f"{low:.3f} to {high:.3f}"
    forms = {"score": ".3f", "signed": "+.3f", "count": ",.0f"}
    if kind in forms:
        return format(value, forms[kind])
    if kind == "percent":
        return f"{100 * value:.0f} %"
    return duration(value) if kind == "seconds" else str(value)


def spread_out(numbers: Sequence[int], most: int) -> list[int]:
    """Chooses numbers at equal distances, the first and the last among them.

    Args:
        numbers: In order.
        most: How many to choose at most, from 2.

    Returns:
        Those chosen, all where they are no more.
    """
    if len(numbers) <= most:
        return list(numbers)
    step = (len(numbers) - 1) / (most - 1)
    return [numbers[round(i * step)] for i in range(most)]
