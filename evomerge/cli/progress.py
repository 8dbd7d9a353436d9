"""What signals do while a search opens and runs; and a counter for verbs that score."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from evomerge.cli.output import tell

if TYPE_CHECKING:
    from evomerge.search import Study

_RESEND_SECONDS = 0.1  # after which a signal whose exception was lost is sent again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
