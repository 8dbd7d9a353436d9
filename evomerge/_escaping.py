"""Text of somebody else's, such as names of models and tasks, made harmless for where it is written.

A terminal obeys escape sequences, Markdown and HTML have their signs, and a line end begins something new.
"""

from __future__ import annotations

import re
from typing import Any

_MARKDOWN = re.compile(r"[\\`*\[\]|~]")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: str) -> str:
    """Text for a terminal or a log: what is not printable is spelt out, line ends and tabs stay.

    Args:
        text: Any text.

    Returns:
        The text, with '\\x1b' and the like as four or more plain characters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _spelt(c) for c in text)


def one_line(text: str) -> str:
    """Text for a line, such as an error message.

    Args:
        text: Any text.

    Returns:
        Its words with one space between two of them, all printable.
    """
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """Text for Markdown, a table's cell too, that is shown as it is and is no HTML.

    Args:
        text: Any text.

    Returns:
        One line whose signs are escaped.
    """
    html = "".join(_HTML.get(c, c) for c in one_line(text))
    return _MARKDOWN.sub(r"\\\g<0>", html)


def markdown_code(text: str) -> str:
    """Text as code in Markdown.

    Args:
        text: Any text.

    Returns:
        One line between as many backticks as it takes.
    """
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_data(value: Any) -> Any:
    """Plain data with every text in it as `markdown` makes it.

    Args:
        value: Nested mappings, lists and scalars.

    Returns:
        The same, keys of mappings included.
    """
    if isinstance(value, str):
        return markdown(value)
    if isinstance(value, dict):
        return {markdown_data(key): markdown_data(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(markdown_data(inner) for inner in value)
    return value


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()
