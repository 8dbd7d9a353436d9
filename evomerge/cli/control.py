"""Verbs about a study that runs elsewhere: status, stop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from evomerge.cli.analysis_tables import duration
from evomerge.cli.options import Json, Root, open_store
from evomerge.errors import StudyError

_LARGE = 64_000_000  # bytes of a store that is not read whole at every look


def status(
    study: Annotated[str | None, typer.Argument(help="Name of the study; all if left out.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")] = 2.0,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """State of a study, its driver and workers, failures, store and backup, best candidate; without a name, every study in a line."""
    if not watch:
        print(_status(study, root, as_json))
        return
    try:
        _watch(lambda: _status(study, root, as_json, again=True), every)
    except KeyboardInterrupt:  # the way to end it
        return


def stop(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    root: Root = None,
) -> None:
    """Ask the search to end when what is in flight has ended: its exit code is 0, and resume goes on. Also from another machine."""
    from evomerge.store import locks, paths, stop_request

    path = paths.store_path(study, paths.root(root))
    driver = stop_request.ask_to_stop(path)
    if driver is None:
        print(f"{study}: no driver runs it, there is nothing to stop")
        return
    print(f"{study}: asked the driver to stop (host {driver.host}, pid {driver.pid})", flush=True)
    if not wait:
        return
    while (found := locks.driver(path)) is not None and found.alive is not False:
        time.sleep(0.1)
    stop_request.clear_stop(path.parent)  # a driver that was killed has left it
    with open_store(study, root) as store:
        row = store.study()
    print(f"{study}: {'nothing stored' if row is None else row.state}")


def _status(study: str | None, root: Path | None, as_json: bool, again: bool = False) -> str:
    """What status prints. again: it is one look of many: dated, JSON in a line, large stores not read whole."""
    from evomerge import reports
    from evomerge.cli import study_tables
    from evomerge.store.paths import root as studies_root
    from evomerge.store.paths import studies

    def read(name: str) -> dict[str, Any] | None:
        with open_store(name, root) as store:
            if study is None and store.study() is None:
                return None
            check = not again or store.path.stat().st_size < _LARGE
            return reports.study_summary(store, check=check) | reports.study_activity(store)

    indent = None if again else 2
    before = [time.strftime("%Y-%m-%d %H:%M:%S")] if again else []
    if study is not None:
        data = read(study)
        assert data is not None
        return (
            json.dumps(data, indent=indent)
            if as_json
            else "\n".join([*before, study_tables.study(data), *activity(data)])
        )
    rows = []
    for name in studies(studies_root(root)):
        try:
            rows.append(read(name))
        except StudyError as error:  # one that cannot be read hides no other
            print(f"error[{error.code}] {error}", file=sys.stderr)
    found = [row for row in rows if row is not None]
    return json.dumps(found, indent=indent) if as_json else "\n".join([*before, study_tables.studies(found)])


def _watch(show: Callable[[], str], every: float) -> None:
    """Draws on a terminal in place; elsewhere one screen after the other."""
    if not sys.stdout.isatty():
        while True:
            print(show(), flush=True)
            time.sleep(every)
    from rich.live import Live
    from rich.text import Text

    with Live(Text(show()), auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            time.sleep(every)
            live.update(Text(show()), refresh=True)


def activity(data: Mapping[str, Any]) -> list[str]:
    """Driver, time, workers, failures, ends and backup in lines."""
    damaged = data["store"] not in ("ok", "not checked")
    lines = [*([f"the store is damaged: {data['way_back']}"] if damaged else []), "", _driver(data)]
    if data["runs"]:
        driven = duration(sum(r["seconds"] for r in data["runs"]), 1)
        lines.append(
            f"driven for {driven}" + (f" in {len(data['runs'])} runs" if len(data["runs"]) > 1 else "")
        )
    lines += [
        f"stage {e['stage'] + 1}, island {e['island'] + 1} ended early: {e['cause']}" for e in data["ended"]
    ]
    if data["workers"]:
        whole = f"{100 * data['utilisation']:.0f} %" if data["utilisation"] is not None else "–"
        lines += [
            "",
            f"{'worker':24}{'host':18}{'device':12}{'jobs':>7}{'busy':>10}{'of its time':>13}   failures, {whole} busy in all",
        ]
        for w in data["workers"]:
            failures = ", ".join(f"{count} {cause}" for cause, count in w["failures"].items()) or "none"
            numbers = f"{w['jobs']:>7}{duration(w['busy'], 1):>10}{100 * w['utilisation']:>11.0f} %"
            lines.append(
                f"{w['worker']:23.23} {w['host']:17.17} {w['device'] or 'cpu':11.11} {numbers}   {failures}"
            )
    lines += [
        f"{f['attempts']} attempts {f['cause']}, the last: {' '.join(f['last'].split())[:160] or 'no word'}"
        for f in data["failures"]
    ]
    b = data["backup"]
    lines.append(
        f"backup: {b['path']}, {duration(b['age'], 1)} old, {b['bytes'] / 1e6:.1f} MB"
        if b
        else "backup: none yet"
    )
    return lines


def _driver(data: Mapping[str, Any]) -> str:
    driver = data["driver"]
    if driver is None or driver["alive"] is False:
        last = (
            f" (the last was host {driver['host']}, pid {driver['pid']})" if driver and driver["pid"] else ""
        )
        return f"driver: none{last}" + (
            f"; go on with: evomerge resume {data['study']}"
            if data["state"] in ("interrupted", "paused")
            else ""
        )
    known = "" if driver["alive"] else ", perhaps: this machine cannot tell"
    return f"driver: host {driver['host']}, pid {driver['pid']}{known}" + (
        ", asked to stop" if data["stop_requested"] else ""
    )
