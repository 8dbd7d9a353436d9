"""Starts drivers of the toy study in processes that have everything imported already, so that a life of one
costs a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from scripts.validation.soak_parts import pieces
from scripts.validation.soak_parts.toy_study import Work, run

_POLL = 0.0005  # seconds between two looks


def context() -> ForkServerContext:
    """Processes of it are forks of one that has imported torch, pycma and the search, and nothing of Ray."""
    os.environ.update(pieces.environment())
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["scripts.validation.soak_parts.toy_study", "cma"])
    return found


def start(of: ForkServerContext, work: Work, target: Callable[..., Any] = run, *more: Any) -> BaseProcess:
    """A driver, just begun."""
    process = of.Process(target=target, args=(work, *more))
    process.start()
    return process


def wait_until(found: Callable[[], bool], process: BaseProcess, seconds: float) -> bool:
    """Whether it came true before the process ended, or the time did."""
    end = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < end:
        if found():
            return True
        time.sleep(_POLL)
    return found()


def size(work: Work) -> int:
    """Bytes of the diary."""
    try:
        return work.diary.stat().st_size
    except FileNotFoundError:
        return 0
