"""What the verbs print: text made harmless for a terminal, in whatever characters its locale has."""

from __future__ import annotations

import codecs
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from evomerge._escaping import printable
from evomerge._redaction import ScrubbedFormatter
from evomerge.errors import unwritable

_PLAIN = {
    "–": "-",
    "—": "-",
    "±": "+-",
    "…": "...",
    "×": "x",
    "▁": ".",
    "▂": ".",
    "▃": ":",
    "▄": ":",
    "▅": "=",
    "▆": "=",
    "▇": "#",
    "█": "#",
}
"""Characters of our own texts -> what stands for them where a locale lacks them."""


def put(text: str, *, flush: bool = False) -> None:
    """Prints a result.

    Args:
        text: One line or several; signs that a terminal obeys are spelt out.
        flush: Whether it is to be seen at once.
    """
    print(printable(text), flush=flush)


def tell(text: str) -> None:
    """Prints a message to standard error, at once.

    Args:
        text: One line or several; signs that a terminal obeys are spelt out.
    """
    print(printable(text), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Says on a terminal what is being done; nothing where standard error is a file or a pipe.

    Args:
        text: One line.
    """
    if _is_terminal():
        tell(text)


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def column_width(names: Sequence[str], least: int) -> int:
    """The width of a column that no name runs out of.

    Args:
        names: What stands in it.
        least: Width of a column of short names.

    Returns:
        Number of characters, one of them free.
    """
    return max(least, *(len(name) + 1 for name in names), 0)


def duration(seconds: float, decimals: int = 0) -> str:
    """A time to be read: '45 s', '12 min' or '3.5 h'.

    Args:
        seconds: At least 0.
        decimals: Of the seconds, where it is shorter than 90 s.

    Returns:
        The text.
    """
    if seconds < 90:
        return f"{seconds:.{decimals}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_in_any_locale() -> None:
    """Has standard output and error replace characters that they lack, which is an error of Python's else.

    What is logged without a handler, warnings, goes there too, without secrets.
    """
    codecs.register_error("evomerge", _replaced)
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(ScrubbedFormatter("%(message)s"))


def _reconfigure(stream: TextIO | Any) -> None:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="evomerge")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("unicode_escape").decode() for c in characters), error.end


def write_text(file: Path, text: str) -> None:
    """Writes a file that the user named.

    Args:
        file: Its path.
        text: What it holds.

    Raises:
        EvomergeError: It cannot be written; says why.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(file, error) from None
