"""Processes that import nothing from the working directory, which may be a model folder of somebody else's.

Python looks there first in what is started with `-c` or `-m`, as multiprocessing and Ray do,
unless told not to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_VARIABLE = "PYTHONSAFEPATH"


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """A context: each Python that is started in it leaves the working directory out of its path."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


class SafeProcess(SpawnProcess):
    """A process of multiprocessing, started with a safe path."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with safe_path():
            return SpawnProcess._Popen(process_obj)


class SafeContext(SpawnContext):
    """multiprocessing's way to start processes anew, each with a safe path."""

    Process = SafeProcess
