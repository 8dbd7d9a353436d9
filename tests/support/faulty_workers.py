"""Workers on a machine that fails: the first attempts of each phase of a search end by the fault that a file
names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from pathlib import Path

from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from tests.support import landscape

ERRORS = {
    "no-space": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no-files": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "no-memory": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "device-lost": RuntimeError("CUDA error: no CUDA-capable device is detected"),
}
FAULTS = (*ERRORS, "killed", "frozen")
PHASES = ("search", "race", "validation", "test")
WHOLE = 16  # items of each generation in the study of the tests; a rung of a race has fewer
TIMES = 2  # that a fault happens in each phase


def phase(items: Items) -> str:
    """The phase of a search that scores such items."""
    ids = [item for own in items.values() for item in own]
    role = {"s": "search", "v": "validation", "t": "test"}[ids[0][0]]
    return "race" if role == "search" and len(ids) < WHOLE else role


def claim(folder: Path, name: str, times: int = TIMES) -> bool:
    """Whether this is one of the first attempts at something; marks it."""
    for number in range(times):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / f"{name}.{number}", os.O_CREAT | os.O_EXCL))
            return True
    return False


def fail(fault: str) -> None:
    """Ends an attempt by a fault."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise ERRORS[fault]


def failed(recipe: Recipe, fault: str) -> Evaluation:
    """What a worker that catches errors gives, if it outlives the fault."""
    try:
        fail(fault)
    except (OSError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
        return Evaluation(recipe.id, (), {}, {}, error=text)
    raise AssertionError("a process that was stopped went on")


class Faulty:
    """Scores by the landscape.

    folder: its file `fault` names the fault, and marks are left there; opening: a fault of the first
    openings; waits: seconds that the first preparation in a process takes.
    """

    def __init__(self, folder: Path, opening: str = "", waits: float = 0.0) -> None:
        self.folder, self.waits = folder, waits
        if opening and claim(folder, "opening"):
            fail(opening)

    def prepare(self, recipe: Recipe, items: Items) -> None:
        """Waits once in each process."""
        threading.Event().wait(self.waits)
        self.waits = 0.0

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe, or fails."""
        file = self.folder / "fault"
        fault = file.read_text() if file.exists() else ""
        if fault and claim(self.folder, f"{fault}.{phase(items)}"):
            return failed(recipe, fault)
        return landscape.evaluation(recipe, items)
