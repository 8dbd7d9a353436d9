"""What the verbs show: progress while a search runs, tables afterwards, signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.search import Progress, Study


class Search:
    """The screen of a running search: a bar per stage on a terminal, else one dated line per event."""

    def __init__(self, name: str) -> None:
        self._name, self._stage, self._said = name, "", 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Search:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            left = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            columns = (*left, TimeRemainingColumn(), TextColumn("{task.fields[best]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("opening models and tasks", total=None, best="")
        else:
            self._line("opening models and tasks")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Draws a progress report."""
        best = f"best {progress.best:.3f}" if progress.best is not None else ""
        if self._bar:
            if progress.stage != self._stage:
                self._bar.update(self._task, visible=False)
                self._task = self._bar.add_task(progress.stage, total=progress.total, best=best)
            self._bar.update(self._task, completed=progress.done, total=progress.total, best=best)
            if progress.note:
                self._bar.console.print(progress.note, highlight=False, markup=False)
        elif progress.note or progress.stage != self._stage or time.monotonic() - self._said > 15:
            self._line(f"{progress.stage} {progress.done}/{progress.total} {progress.note or best}".rstrip())
        self._stage = progress.stage

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def opening() -> Iterator[None]:
    """Until the search runs, SIGTERM and SIGUSR1 leave at once with 75, SIGINT with 130: nothing is begun, start it again.

    An exception that a handler raises can be lost in a callback of a library; the signal is remembered and answered at the end.
    """
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if not asked:
            print("stopped while opening; start it again", file=sys.stderr, flush=True)
        asked.append(130 if number == signal.SIGINT else 75)
        raise SystemExit(asked[0])

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
        if asked:
            raise SystemExit(asked[0])
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def signals(study: Study) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGUSR1 lets what is in flight end within the grace, the second drops it, the third kills."""
    from evomerge.search import StopRequest

    def handler(number: int, frame: FrameType | None) -> None:
        if study.dispatch.stop is StopRequest.DROP:
            os._exit(130)
        if study.dispatch.request_stop() is StopRequest.DROP:
            raise KeyboardInterrupt
        print(
            f"stopping within {study.dispatch.grace:g} s, when what is in flight has ended; once more to drop that",
            file=sys.stderr,
            flush=True,
        )

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A counter on a terminal; silent elsewhere. Yields what to call with the count and the total."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False) as counter:

        def show(done: int, total: int) -> None:
            counter.total = total
            counter.update(done - counter.n)

        yield show
