"""What tests of the command line share: the type of a call, and what an error has to look like."""

from __future__ import annotations

import re
from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]
"""Runs a verb: words -> (exit code, standard output, standard error)."""


def one_line(err: str, code: str) -> str:
    """The only line of an error of that code; dated lines are progress."""
    lines = [line for line in err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"error[{code}] "), err
    assert "Traceback" not in err
    return lines[0]
