"""Verbs about a study that runs elsewhere: status, stop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evomerge.cli import completion
from evomerge.cli.options import Json, Root, open_store, reading_store
from evomerge.cli.output import duration, put, tell
from evomerge.errors import EvomergeError

_LEFT = 8  # lines that a watched status leaves on the terminal
_LARGE = 64_000_000  # bytes of a store that --watch does not check as a whole at every refresh


def status(
    study: Annotated[
        str | None,
        typer.Argument(help="Name of the study; all if left out.", autocompletion=completion.studies),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes of --watch.")] = 2.0,
    whole: Annotated[bool, typer.Option("--all", help="Show every parent and hand recipe.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Show the state of a study, or of all.

    Of a study: the verdict, or its best so far, pace, time left and cost; scores beside the strongest parents
    and hand recipes; driver and workers, failures, store and backup. Without a name: a line for each.
    """
    screen = _StatusScreen(study, root, as_json, watch, whole)
    if not watch:
        put(screen.text())
        return
    try:
        _refresh(screen.text, every)
    except KeyboardInterrupt:  # the way to end it
        return


def stop(
    study: Annotated[str, typer.Argument(help="Name of the study.", autocompletion=completion.studies)],
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    root: Root = None,
) -> None:
    """Ask a running search to end.

    It ends when what is in flight has ended, with exit code 0; resume goes on. Works from another machine
    too.
    """
    from evomerge.store import locks, paths, stop_request

    path = paths.store_path(study, paths.root(root))
    driver = stop_request.ask_to_stop(path)
    if driver is None:
        put(f"{study}: no driver runs it, there is nothing to stop")
        return
    put(f"{study}: asked the driver to stop (host {driver.host}, pid {driver.pid})", flush=True)
    if not wait:
        return
    while (running := locks.driver(path)) is not None and running.alive is not False:
        time.sleep(0.1)
    stop_request.clear_stop(path.parent)  # a driver that was killed has left it
    with open_store(study, root) as store:
        row = store.study()
    put(f"{study}: {'nothing stored' if row is None else row.state}")


@dataclass(frozen=True, slots=True)
class _StatusScreen:
    """What status prints of one study, or of all where `study` is None.

    refreshed: the text is one of many: dated, its JSON in one line, and large stores are not checked as a
    whole; whole: every parent and hand recipe has a row.
    """

    study: str | None
    root: Path | None
    as_json: bool
    refreshed: bool
    whole: bool

    def text(self) -> str:
        from evomerge.cli import study_tables

        read = self._all() if self.study is None else [self._read(self.study)]
        found = [one for one in read if one is not None]
        data: Any = [data for data, _ in found] if self.study is None else found[0][0]
        if self.as_json:
            return json.dumps(data, indent=None if self.refreshed else 2)
        lines = [time.strftime("%Y-%m-%d %H:%M:%S")] if self.refreshed else []
        return "\n".join(
            [*lines, *(text for _, text in found)] if found else [*lines, study_tables.NO_STUDIES]
        )

    def _all(self) -> list[tuple[dict[str, Any], str] | None]:
        from evomerge.store import paths

        rows: list[tuple[dict[str, Any], str] | None] = []
        for name in paths.studies(paths.root(self.root)):
            try:
                rows.append(self._read(name))
            except EvomergeError as error:  # one that cannot be read hides no other
                tell(f"error[{error.code}] {error}")
        return rows

    def _read(self, name: str) -> tuple[dict[str, Any], str] | None:
        """A study's data and text; None, among all studies, for one that has not begun."""
        from evomerge import reports
        from evomerge.cli import study_tables

        with reading_store(name, self.root) as store:
            if self.study is None and store.study() is None:
                return None
            check = not self.refreshed or store.path.stat().st_size < _LARGE
            data = reports.study_summary(store, check=check) | reports.study_activity(store)
            if self.study is None:
                return data, study_tables.line_of_study(data)
            return data, "\n".join([study_tables.study_table(data, self.whole), *activity_lines(data)])


def _refresh(text: Callable[[], str], every: float) -> None:
    """Draws over the whole terminal, and leaves the last state there at the end; elsewhere text after text.

    What a terminal has no room for is cut off at its end, so that nothing runs out of its top.
    """
    if not sys.stdout.isatty():
        while True:
            put(text(), flush=True)
            time.sleep(every)
    from rich.live import Live
    from rich.text import Text

    shown = text()
    try:
        with Live(Text(shown), auto_refresh=False, screen=True) as live:
            while True:
                live.update(Text(shown), refresh=True)
                time.sleep(every)
                shown = text()
    finally:
        put("\n".join(shown.split("\n\n")[0].splitlines()[:_LEFT]))


def activity_lines(data: Mapping[str, Any]) -> list[str]:
    """Driver, time, workers, failures, early ends and backup of a study.

    Args:
        data: As `evomerge.reports.study_summary` and `evomerge.reports.study_activity` give it, in one
        mapping.

    Returns:
        The lines.
    """
    lines = []
    if data["store"] not in ("ok", "not checked"):
        lines.append(f"the store is damaged: {data['way_back']}")
    lines += ["", _driver_line(data)]
    if data["runs"]:
        driven = duration(sum(run["seconds"] for run in data["runs"]), 1)
        runs = f" in {len(data['runs'])} runs" if len(data["runs"]) > 1 else ""
        limit = data["figures"]["limits"]["hours"]
        lines.append(f"driven for {driven}{runs}" + ("" if limit is None else f", of {limit:g} h"))
    for end in data["ended"]:
        place = f"stage {end['stage'] + 1}, island {end['island'] + 1}"
        lines.append(f"{place} ended early: {end['cause']}")
    lines += _worker_lines(data)
    for failure in data["failures"]:
        last = " ".join(failure["last"].split())[:160] or "no message"
        lines.append(f"{failure['attempts']} attempts {failure['cause']}, the last: {last}")
    backup = data["backup"]
    if backup:
        age, size = duration(backup["age"], 1), f"{backup['bytes'] / 1e6:.1f} MB"
        lines.append(f"backup: {backup['path']}, {age} old, {size}")
    else:
        lines.append("backup: none yet")
    return lines


def _worker_lines(data: Mapping[str, Any]) -> list[str]:
    if not data["workers"]:
        return []
    busy = "–" if data["utilisation"] is None else f"{100 * data['utilisation']:.0f} %"
    columns = f"{'worker':24}{'host':18}{'device':12}{'jobs':>7}{'busy':>10}{'of its time':>13}"
    lines = ["", f"{columns}   failures, {busy} busy in all"]
    for w in data["workers"]:
        failures = ", ".join(f"{count} {cause}" for cause, count in w["failures"].items()) or "none"
        numbers = f"{w['jobs']:>7}{duration(w['busy'], 1):>10}{100 * w['utilisation']:>11.0f} %"
        place = f"{w['worker']:23.23} {w['host']:17.17} {w['device'] or 'cpu':11.11}"
        lines.append(f"{place} {numbers}   {failures}")
    return lines


def _driver_line(data: Mapping[str, Any]) -> str:
    driver = data["driver"]
    if driver is None or driver["alive"] is False:
        last, advice = "", ""
        if driver and driver["pid"]:
            last = f" (the last was host {driver['host']}, pid {driver['pid']})"
        if data["state"] in ("interrupted", "paused"):
            advice = f"; go on with: evomerge resume {data['study']}"
        return f"driver: none{last}{advice}"
    doubt = "" if driver["alive"] else ", perhaps: this machine cannot tell"
    stopping = ", asked to stop" if data["stop_requested"] else ""
    return f"driver: host {driver['host']}, pid {driver['pid']}{doubt}{stopping}"
