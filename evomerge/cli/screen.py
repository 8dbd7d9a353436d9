"""What a running search shows: one block on a terminal, dated lines elsewhere, JSON lines, or nothing."""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from evomerge._escaping import printable
from evomerge.cli import study_tables
from evomerge.cli.output import tell

if TYPE_CHECKING:
    from evomerge.reports.monitor import Update
    from evomerge.search import Progress

_QUIET_SECONDS = 15  # after which a line is printed without a terminal, though nothing happened
_BAR = 24  # columns of the bar
_LABEL = 6  # columns before a line of the block


class SearchScreen(Protocol):
    """Shows a search: a context manager, told of the progress while it opens and of updates as it runs."""

    def __enter__(self) -> SearchScreen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """Shows the progress of opening.

        Args:
            progress: What has been done so far.
        """

    def update(self, update: Update) -> None:
        """Shows an update of the search.

        Args:
            update: What happened.
        """


def open_screen(name: str, *, quiet: bool = False, as_json: bool = False) -> SearchScreen:
    """Makes the screen that fits where standard error goes.

        with open_screen("demo") as screen:
            study = prepare_study(request, root, show=screen.show)
            run_study(study, [screen])

    Args:
        name: Name of the study.
        quiet: Show nothing.
        as_json: Print JSON lines to standard output instead.

    Returns:
        The screen.
    """
    if as_json:
        return JsonLines(name)
    if quiet:
        return Quiet()
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Block(name)
    return DatedLines(name)


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, progress: Progress) -> None:
        """See `SearchScreen.show`."""

    def update(self, update: Update) -> None:
        """See `SearchScreen.update`."""


class JsonLines(Quiet):
    """Prints each update but mere progress as a line of JSON.

    What libraries print meanwhile goes to standard error.
    """

    def __init__(self, name: str) -> None:
        """A screen of one study.

        Args:
            name: Its name.
        """
        self._name, self._output = name, sys.stdout

    def __enter__(self) -> JsonLines:
        self._output, sys.stdout = sys.stdout, sys.stderr
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout = self._output

    def update(self, update: Update) -> None:
        """See `SearchScreen.update`."""
        if update.kind == "progress":
            return
        trial = update.trial
        line: dict[str, Any] = {
            "event": update.kind,
            "time": round(time.time(), 3),
            "study": self._name,
            "stage": update.stage,
            "done": update.done,
            "total": update.total,
            "text": update.text,
            "figures": update.figures.to_json(),
        }
        if trial is not None:
            line["candidate"] = {
                "id": trial.id,
                "generation": trial.generation,
                "origin": trial.origin,
                "label": trial.label,
                "score": trial.score,
                "reported": trial.reported,
                "error": trial.error,
                "metrics": dict(trial.metrics),
            }
        if update.kind == "end":
            line |= {"state": update.state, "results": dict(update.results)}
        print(json.dumps(line), file=self._output, flush=True)


class DatedLines(Quiet):
    """Prints a dated line for each generation, new best, failure and note, and for a long silence."""

    def __init__(self, name: str) -> None:
        """A screen of one study.

        Args:
            name: Its name.
        """
        self._name, self._stage, self._last_line = name, "", 0.0

    def __enter__(self) -> DatedLines:
        self._line("opening models and tasks")
        return self

    def show(self, progress: Progress) -> None:
        """See `SearchScreen.show`."""
        best = f"best {progress.best:.3f}" if progress.best is not None else ""
        self._say(progress.stage, progress.done, progress.total, progress.note, best)

    def update(self, update: Update) -> None:
        """See `SearchScreen.update`."""
        if update.kind == "end":  # what follows says it
            return
        text, best = update.text, _short_best(update)
        if update.kind == "generation" and best:
            text += f"; {best}{_time_left(update)}"
        self._say(update.stage, update.done, update.total, text, best)

    def _say(self, stage: str, done: int, total: int, text: str, otherwise: str) -> None:
        quiet = time.monotonic() - self._last_line
        if text or stage != self._stage or quiet > _QUIET_SECONDS:
            self._line(f"{stage} {done}/{total} {text or otherwise}".rstrip())
        self._stage = stage

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        tell(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._name}: {text}")


class Block(Quiet):
    """Keeps one block at the foot of a terminal; new bests, failures and notes are printed above it."""

    def __init__(self, name: str) -> None:
        """A screen of one study.

        Args:
            name: Its name.
        """
        from rich.console import Console
        from rich.live import Live

        self._name = name
        self._stage, self._done, self._total = "opening models and tasks", 0, 1
        self._generation, self._update = "", None
        self._live = Live(console=Console(stderr=True), get_renderable=self._block, transient=True)

    _update: Update | None

    def __enter__(self) -> Block:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: Progress) -> None:
        """See `SearchScreen.show`."""
        self._stage, self._done, self._total = progress.stage, progress.done, progress.total
        if progress.note:
            self._print(progress.note)

    def update(self, update: Update) -> None:
        """See `SearchScreen.update`."""
        self._update = update
        self._stage, self._done, self._total = update.stage, update.done, update.total
        if update.kind == "generation":
            self._generation = update.text
        elif update.text and update.kind != "end":
            self._print(update.text)

    def _print(self, text: str) -> None:
        self._live.console.print(printable(text), highlight=False, markup=False)

    def _block(self) -> Any:
        """The block as rich draws it."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        cells: list[Any] = [Text(f"{self._name}: {self._stage}")]
        if self._total > 1:
            bar = ProgressBar(total=self._total, completed=self._done, width=_BAR)
            cells += [bar, Text(f"{self._done}/{self._total}")]
        head.add_row(*cells)
        lines = [Text(printable(line), no_wrap=True, overflow="ellipsis") for line in self._lines()]
        return Group(head, *lines)

    def _lines(self) -> list[str]:
        """Best, pace and last generation, each in one line."""
        if self._update is None:
            return []
        figures = self._update.figures.to_json()
        lines = []
        if figures["best"] is not None:
            lines.append(f"{'best':{_LABEL}}{study_tables.best_so_far(figures)}")
        if figures["rate"] is not None:
            lines.append(f"{'pace':{_LABEL}}{study_tables.pace(figures)}")
        failed = f"{figures['failed']} failed" if figures["failed"] else "none failed"
        lines.append(f"{'used':{_LABEL}}{study_tables.spent(figures)}; {failed}")
        if self._generation:
            lines.append(f"{'last':{_LABEL}}{self._generation}")
        return lines


def _short_best(update: Update) -> str:
    """'best so far 0.612 ± 0.021'; '' before there is one."""
    best = update.figures.best
    return "" if best is None else f"best so far {best}"


def _time_left(update: Update) -> str:
    from evomerge.cli.output import duration

    return "" if not update.figures.eta else f", about {duration(update.figures.eta)} left"
