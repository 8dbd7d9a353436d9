"""What the workers did: a timeline of attempts, and failures by cause."""

from __future__ import annotations

import re
from collections import Counter

from evomerge._escaping import one_line
from evomerge.reports.panels.panel import Column, Panel, Table, rounded
from evomerge.reports.panels.snapshot import Snapshot

_ATTEMPTS = 2000  # the latest, which are drawn
_LISTED = 12
_LONGEST = 160  # characters of an error
_SHORT = 60  # of one in the chart
_NUMBER = re.compile(r"\d[\d.,]*")


def timeline(snapshot: Snapshot) -> Panel:
    """Makes the panel of the workers' timeline.

    Args:
        snapshot: Of the study.

    Returns:
        The latest 2,000 attempts by worker and time, and what each worker did in all.
    """
    caption = "A bar is one attempt at a candidate; a gap is time in which a worker waited. Drag to zoom."
    workers = snapshot.activity["workers"]
    if not workers:
        return Panel("timeline", "Workers", caption, note="No worker has reported an attempt yet.")
    latest = snapshot.attempts[-_ATTEMPTS:]
    names = [_worker_name(w["worker"], w["host"]) for w in workers]
    places = {(w["worker"], w["host"]): place for place, w in enumerate(workers)}
    causes = list(dict.fromkeys(attempt.cause for attempt in latest))
    start = min((attempt.started for attempt in latest), default=0.0)
    chart = {
        "workers": names,
        "causes": causes,
        "start": start,
        "attempts": [
            [
                places[attempt.worker, attempt.host],
                rounded(attempt.started - start, 2),
                rounded(attempt.seconds, 2),
                causes.index(attempt.cause),
            ]
            for attempt in latest
            if (attempt.worker, attempt.host) in places
        ],
        "shown": len(latest),
        "total": len(snapshot.attempts),
    }
    columns = (
        Column("worker"),
        Column("host"),
        Column("device"),
        Column("jobs", "count"),
        Column("busy", "seconds"),
        Column("of its time", "percent"),
        Column("failures"),
    )
    rows = tuple(
        (
            w["worker"],
            w["host"],
            w["device"] or "cpu",
            w["jobs"],
            w["busy"],
            w["utilisation"],
            ", ".join(f"{count} {cause}" for cause, count in w["failures"].items()) or "none",
        )
        for w in workers
    )
    return Panel("timeline", "Workers", caption, chart, (Table("Workers", columns, rows),))


def _worker_name(worker: str, host: str) -> str:
    return f"{worker} on {host}"


def failures(snapshot: Snapshot) -> Panel:
    """Makes the panel of failures.

    Args:
        snapshot: Of the study.

    Returns:
        Attempts that ended without a result by cause, and candidates that cannot be scored by their error.
    """
    title = "Failures by cause"
    caption = (
        "Attempts that ended without a score are tried again where the machine is to blame; a candidate that "
        "cannot be scored counts as failed."
    )
    by_cause = [row for row in snapshot.activity["failures"] if row["cause"] != "done"]
    failed = [(trial.id, one_line(trial.error)) for trial in snapshot.trials if trial.error]
    errors = Counter(_kind(error) for _, error in failed)
    if not by_cause and not errors:
        return Panel("failures", title, caption, note="Nothing has failed.")
    first = {_kind(error): (number, error[:_LONGEST]) for number, error in reversed(failed)}
    tables = []
    if by_cause:
        columns = (Column("cause"), Column("attempts", "count"), Column("last message"))
        rows = tuple((r["cause"], r["attempts"], one_line(r["last"])[:_LONGEST]) for r in by_cause)
        tables.append(Table("Attempts without a score", columns, rows))
    if errors:
        columns = (Column("error"), Column("candidates", "count"), Column("first", "candidate"))
        listed = tuple((first[kind][1], count, first[kind][0]) for kind, count in errors.most_common(_LISTED))
        tables.append(Table("Candidates that failed, by error", columns, listed))
    shown = [(r["cause"], r["attempts"]) for r in by_cause if r["cause"] != "failed"]
    shown += [(kind[:_SHORT], count) for kind, count in errors.most_common(_LISTED)]
    chart = {"causes": [name for name, _ in shown], "counts": [count for _, count in shown]}
    return Panel("failures", title, caption, chart, tuple(tables))


def _kind(error: str) -> str:
    """An error without its numbers, which are others for each candidate."""
    return _NUMBER.sub("…", error)
