"""Parameters of tests of which only some run with every change; the script `sweeps` runs the others, and the
long tests that have the mark without parameters.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], always: Container[Any]) -> list[Any]:
    """Marks parameters as parts of a sweep.

    Args:
        values: All parameters; tuples for several arguments.
        always: Those that run with every change.

    Returns:
        The parameters for `pytest.mark.parametrize`.
    """
    found = []
    for value in values:
        arguments = value if isinstance(value, tuple) else (value,)
        name = "-".join(getattr(a, "__name__", str(a)) for a in arguments)
        found.append(value if value in always else pytest.param(*arguments, marks=pytest.mark.sweep, id=name))
    return found
