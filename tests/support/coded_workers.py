"""Workers without a model for the tests of the Ray pool: what a recipe does to its worker is coded in its
seed.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from evomerge.evaluation import Evaluation, GradientRequest, Items, Slopes
from evomerge.recipes import Recipe
from evomerge.workers import Job, Pool
from tests.support.toy import ToyPool, weight_space

FINE, KILLS, KILLS_ONCE, HANGS, HANGS_ONCE, NAN, CUDA, CUDA_ONCE, GROWS, RAISES, WAITS, FREEZES_ONCE, LOGS = (
    range(13)
)
ITEMS = {"first": ("a", "b", "c")}
SPACE = weight_space()
SECRET = "hf_abcdefghijklmnopqrstuvwx"


@functools.cache
def recipe(code: int, number: int = 0) -> Recipe:
    """A recipe that does what `code` says; number: tells it from others."""
    return replace(SPACE.decode([0.3] * len(SPACE.axes)), seed=code * 1000 + number)


def jobs(*codes: int) -> list[Job]:
    """A job for each code, its slot its place in the list."""
    return [Job(i, recipe(code, i), ITEMS) for i, code in enumerate(codes)]


def toy(job: Job) -> Evaluation:
    """What a worker gives for a recipe that does no harm."""
    return ToyPool().evaluate(job.recipe, job.items)


class Coded:
    """folder: where marks are left, one for each begun evaluation: 'CODE.NUMBER.PID.COUNT'."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.held = folder, 0, bytearray()
        (folder / f"open.{os.getpid()}").touch()

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        code, number = divmod(recipe.seed, 1000)
        first = not list(self.folder.glob(f"{code}.{number}.*"))
        self.count += 1
        (self.folder / f"{code}.{number}.{os.getpid()}.{self.count}").touch()
        if code == KILLS or (code == KILLS_ONCE and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if code == FREEZES_ONCE and first:
            os.kill(os.getpid(), signal.SIGSTOP)
        if code == HANGS or (code == HANGS_ONCE and first):
            threading.Event().wait()
        if code == CUDA or (code == CUDA_ONCE and first):
            return Evaluation(
                recipe.id,
                (),
                {},
                {},
                error="AcceleratorError: CUDA error: an illegal memory access was encountered",
            )
        if code == NAN:
            return Evaluation(recipe.id, (), {}, {}, error="the model's logits are NaN")
        if code == GROWS:
            self.held = bytearray(os.urandom(1)) * (160 << 20)
        if code == RAISES:
            raise RuntimeError("a worker that does not catch")
        if code == LOGS:
            logging.getLogger("evomerge.workers.worker").warning("read with token %s", SECRET)
            return Evaluation(recipe.id, (), {}, {}, error="ValueError: no")
        if code == WAITS:  # until the test says so
            gate = self.folder / "go"
            while not gate.exists():
                threading.Event().wait(0.02)
        return ToyPool().evaluate(recipe, items)

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        """The weights that were asked for, as partial derivatives of tensors called like the tasks."""
        partials = {(task, "weight", "a"): weight for task, weight in request.weights.items()}
        return Evaluation(recipe.id, (), {}, {}, slopes=Slopes(float(len(items)), partials))


def until(done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Waits for something that another process does; fails the test where it does not come."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what} did not come in {seconds:g} s"
        threading.Event().wait(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def opened(folder: Path) -> set[int]:
    """The processes that opened a worker here."""
    return {int(file.name.split(".")[1]) for file in folder.glob("open.*")}


def begun(folder: Path, code: int, number: int) -> list[Path]:
    """The marks of a recipe's evaluations."""
    return list(folder.glob(f"{code}.{number}.*"))


def every(pool: Pool, seconds: float = 200.0) -> dict[int, Evaluation]:
    """All that is out, by slot; each once, and none later than that after the one before."""
    found: dict[int, Evaluation] = {}
    while pool.out:
        result = pool.result(seconds)
        assert result is not None, f"no result in {seconds:g} s"
        assert result[0].slot not in found
        found[result[0].slot] = result[1]
    assert pool.result(0.1) is None
    return found
