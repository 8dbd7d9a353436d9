"""Workers on a machine that fails: the first attempts of each phase of a search end by the fault that a file
names. Loads no torch, so that processes of workers start quickly.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.errors import CheckpointError, SetupError
from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.workers import Job, ProcessPool
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


def wait_until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for what another process does, or for so long."""
    for _ in range(int(seconds / 0.02)):
        if done():
            return
        threading.Event().wait(0.02)


class Company:
    """Scores by the landscape.

    deadly: recipes that kill their process; slow: one that lasts on when two have died beside it.
    """

    def __init__(self, folder: Path, deadly: tuple[str, ...], slow: str = "") -> None:
        self.folder, self.deadly, self.slow = folder, deadly, slow

    def marks(self, name: str) -> int:
        return len(list(self.folder.glob(f"{name}.*")))

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        if recipe.id in self.deadly:
            if self.slow:
                wait_until(lambda: self.marks("slow") > 0)
                threading.Event().wait(0.5)
            (self.folder / f"died.{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if recipe.id == self.slow:
            (self.folder / f"slow.{os.getpid()}").touch()
            wait_until(lambda: self.marks("died") >= 2)
            threading.Event().wait(2.0)
        return landscape.evaluation(recipe, items)


class Blocked:
    """Its first process ends at its first job; all others never open."""

    def __init__(self, folder: Path, opens: bool = True) -> None:
        self.folder = folder
        if not opens or (folder / "died").exists():
            (folder / f"blocked.{os.getpid()}").touch()
            threading.Event().wait()

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        (self.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")


class ParentChanged:
    """Finds a parent's file changed."""

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        raise CheckpointError("model.safetensors was changed or deleted while the search reads it")


class Deadly:
    """Scores by the landscape; each evaluation leaves a mark.

    deadly: recipes that kill their process; flaky: one that kills it once.
    """

    def __init__(self, folder: Path, deadly: tuple[str, ...] = (), flaky: str = "") -> None:
        self.folder, self.deadly, self.flaky = folder, deadly, flaky

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        mark = self.folder / "died"
        if recipe.id in self.deadly or (recipe.id == self.flaky and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{recipe.id}.{os.getpid()}").touch()
        return landscape.evaluation(recipe, items)


def fails_to_open() -> Deadly:
    """A worker that is never there."""
    raise SetupError("no model here")


def drive(folder: Path, jobs: Sequence[Job]) -> None:
    """Has a pool of one process evaluate the same jobs for a long time."""
    with ProcessPool(functools.partial(Deadly, folder), 1) as pool:
        for _ in range(1000):
            pool.submit(jobs)
            while pool.out:
                pool.result()
