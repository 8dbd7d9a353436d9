"""What the command line's library finds wrong in a command, in one line of ours."""

from __future__ import annotations

import re
from typing import Any

_TEXTS = (
    (r"Input should be a valid integer\b.*", "should be a whole number"),
    (r"Unable to parse input string as an integer.*", "should be a whole number of fewer digits"),
    (r"Input should be a valid number\b.*", "should be a number"),
    (r"Input should be greater than or equal to (\S+)", r"should be at least \1"),
    (r"Input should be less than or equal to (\S+)", r"should be at most \1"),
    (r"Input should be greater than (\S+)", r"should be above \1"),
    (r"Input should be less than (\S+)", r"should be below \1"),
    (r"Input should be a valid boolean\b.*", "should be true or false"),
    (r"Input should be (?:a |an )?(.*)", r"should be \1"),
    (r"(?:Value error|Assertion failed), (.*)", r"\1"),
)
"""What the library says of a value -> what we say; the first that fits counts."""


def usage_line(error: Any) -> str:
    """One line for a command that cannot be understood.

    Args:
        error: What typer raised.

    Returns:
        What is wrong, and where the help is.
    """
    message = " ".join(str(error.format_message()).split())
    found = re.fullmatch(r"Invalid value for (.+?)(?: \(env var: '(\w+)'\))?: (.*)", message)
    if found:
        name = " / ".join(re.findall(r"'([^']+)'", found[1])) or found[1]
        variable = f" (or ${found[2]})" if found[2] else ""
        message = f"{name}{variable} {_in_our_words(found[3])}"
    context = getattr(error, "ctx", None)
    command = " ".join(["evomerge", *_names(context)])
    return f"{message.rstrip('.')}; see {command} --help"


def _in_our_words(text: str) -> str:
    for pattern, ours in _TEXTS:
        if re.fullmatch(pattern, text):
            return re.sub(pattern, ours, text)
    return text


def _names(context: Any) -> list[str]:
    """The verb that a context is of, if there is one."""
    return [context.info_name] if context is not None and context.parent is not None else []
