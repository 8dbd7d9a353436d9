"""What is shown while a verb works: the progress of a search, counters; and what signals do meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from evomerge._escaping import printable
from evomerge.cli.output import tell

if TYPE_CHECKING:
    from evomerge.search import Progress, Study

_QUIET_SECONDS = 15  # after which a line is printed without a terminal, though nothing happened
_RESEND_SECONDS = 0.1  # after which a signal whose exception was lost is sent again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SearchScreen:
    """The progress of a running search: a bar per stage on a terminal, else one dated line per event.

    A context manager:

        with SearchScreen("demo") as screen:
            study = prepare_study(request, root, show=screen.show)
            study.run()
    """

    def __init__(self, name: str) -> None:
        self._name, self._stage, self._last_line = name, "", 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> SearchScreen:
        if sys.stderr.isatty():
            self._bar = _progress_bar()
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
        """Draws a progress report.

        Args:
            progress: What the search has done so far.
        """
        best = f"best {progress.best:.3f}" if progress.best is not None else ""
        if self._bar:
            if progress.stage != self._stage:
                self._bar.update(self._task, visible=False)
                self._task = self._bar.add_task(progress.stage, total=progress.total, best=best)
            self._bar.update(self._task, completed=progress.done, total=progress.total, best=best)
            if progress.note:
                self._bar.console.print(printable(progress.note), highlight=False, markup=False)
        else:
            quiet = time.monotonic() - self._last_line
            if progress.note or progress.stage != self._stage or quiet > _QUIET_SECONDS:
                text = progress.note or best
                self._line(f"{progress.stage} {progress.done}/{progress.total} {text}".rstrip())
        self._stage = progress.stage

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        tell(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._name}: {text}")


def _progress_bar() -> Any:
    """rich's progress bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        console=Console(stderr=True),
    )


@contextmanager
def stop_while_opening() -> Iterator[None]:
    """Until the search runs, SIGTERM and SIGUSR1 leave at once with 75, SIGINT with 130.

    Nothing is begun by then; the user is told to start it again.

    An exception that a handler raises inside a weak reference's callback or a `__del__` method is lost, and
    Python prints it as ignored: the signal is then sent again a moment later, and answered at the latest at
    the end. A library may also make an error of its own of it: whatever comes after a signal is its answer.

    Yields:
        None, while the signals are handled so.

    Raises:
        SystemExit: With 75 or 130 after a signal.
    """
    codes: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if not codes:
            tell("stopped while opening; start it again")
        codes.append(130 if number == signal.SIGINT else 75)
        raise SystemExit(codes[0])

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        if not codes or not isinstance(lost.exc_value, SystemExit):
            print_lost(lost)
            return
        timers.append(threading.Timer(_RESEND_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[-1].start()

    timers: list[threading.Timer] = []
    print_lost = sys.unraisablehook
    with _handled_by(handler):
        sys.unraisablehook = send_again
        try:
            yield
        except Exception:
            if not codes:
                raise
        finally:
            sys.unraisablehook = print_lost
            for timer in timers:
                timer.cancel()
        if codes:
            raise SystemExit(codes[0])


@contextmanager
def stop_while_running(study: Study) -> Iterator[None]:
    """While a study runs, the first SIGINT, SIGTERM or SIGUSR1 stops it softly, the second at once.

    The third kills the process.

    Softly: evaluations in flight end within the grace; at once: they are dropped.

    Args:
        study: The study that runs.

    Yields:
        None, while the signals are handled so.

    Raises:
        KeyboardInterrupt: In the main thread at the second signal.
    """
    from evomerge.search import StopRequest

    def handler(number: int, frame: FrameType | None) -> None:
        if study.dispatch.stop is StopRequest.DROP:
            os._exit(130)
        if study.dispatch.request_stop() is StopRequest.DROP:
            raise KeyboardInterrupt
        grace = f"{study.dispatch.grace:g} s"
        line = f"stopping within {grace}, when what is in flight has ended; once more to drop that"
        tell(line)

    with _handled_by(handler):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs a handler for the signals that end a search; the handlers of before come back at the end."""
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A counter on a terminal; silent elsewhere.

    Args:
        unit: What is counted, in the plural.

    Yields:
        What to call with the count so far and the total.
    """
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False) as counter:

        def show(done: int, total: int) -> None:
            counter.total = total
            counter.update(done - counter.n)

        yield show
