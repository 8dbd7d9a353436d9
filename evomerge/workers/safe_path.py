"""Processes that import nothing from the working directory, which may be a model folder of somebody else's.

Python looks there first in what is started with `-c` or `-m`, as multiprocessing and Ray do,
unless told not to. What a process is told it is told by variables of its environment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_VARIABLE = "PYTHONSAFEPATH"


@contextlib.contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """A context: processes that are started in it have these variables too.

    Args:
        given: name -> value.

    Yields:
        None.
    """
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def safe_path() -> contextlib.AbstractContextManager[None]:
    """A context: each Python that is started in it leaves the working directory out of its path."""
    return variables({_VARIABLE: "1"})


class SafeProcess(SpawnProcess):
    """A process of multiprocessing, started with a safe path."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with safe_path():
            return SpawnProcess._Popen(process_obj)


class SafeContext(SpawnContext):
    """multiprocessing's way to start processes anew, each with a safe path."""

    Process = SafeProcess
