"""SIGKILL, hundreds of times, to the driver of a study; at its end the study is the one that nobody
killed.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import drivers, pieces, toy_study
from scripts.validation.soak_parts.toy_study import Work

_LINE = 44  # bytes of a line of the diary, about
_LINES = 3  # of an evaluation
_PATIENCE = 180.0  # seconds until a driver has begun to evaluate


def run(
    folder: Path, *, evaluations: int, kills: int, ray: int, seed: int, ray_evaluations: int = 0
) -> dict[str, Any]:
    """Kills drivers of one study until the kills are used up, lets it end, and compares it with an unbroken
    run.

    ray: how many of the kills are of a driver with two Ray workers, on a study of its own with
    `ray_evaluations` and two islands.
    """
    found: dict[str, Any] = {"parts": []}
    parts = [("in-process", Work(folder / "process", evaluations), kills - ray)]
    if ray:
        parts.append(("Ray", Work(folder / "ray", ray_evaluations, islands=2, ray=2, hold=0.02), ray))
    for name, work, count in parts:
        found["parts"].append({"pool": name} | _part(work, count, random.Random(f"{seed}/{name}")))
    return found


def _part(work: Work, kills: int, rng: random.Random) -> dict[str, Any]:
    work.folder.mkdir(parents=True, exist_ok=True)
    state = work.folder / "state.json"
    data = pieces.read(state) or {
        "kills": 0,
        "starts": 0,
        "seconds": 0.0,
        "during": {"start": 0, "replay": 0, "evaluations": 0},
        "work": [kills, work.evaluations],
        "code": pieces.code(),
    }
    if data["work"] != [kills, work.evaluations]:
        raise SystemExit(
            f"{work.folder} was begun with other sizes: {data['work']}; give those, or another --work folder"
        )
    context = drivers.context()
    while data["kills"] < kills and not is_over(work):
        rng.seed(f"{rng.random()}/{data['starts']}")
        started = time.monotonic()
        phase = _one(context, work, kills - data["kills"], rng)
        data["starts"] += 1
        data["seconds"] += time.monotonic() - started
        if phase:
            data["kills"] += 1
            data["during"][phase] += 1
        pieces.write(state, data)
    if not is_over(work):  # the last life is left alone
        last = drivers.start(context, work)
        last.join()
        if last.exitcode != 0:
            raise SystemExit(f"the last driver ended with {last.exitcode}; see {work.folder / 'crashes'}")
        data["starts"] += 1
        pieces.write(state, data)
    whole = replace(work, folder=work.folder.with_name(work.folder.name + "-whole"), ray=0, hold=0.0)
    if not is_over(whole):
        whole.folder.mkdir(exist_ok=True)
        unbroken = drivers.start(context, whole)
        unbroken.join()
    return data | _compared(work, whole)


def _one(context: Any, work: Work, left: int, rng: random.Random) -> str | None:
    """Starts a driver and kills it: at its start, while it replays, or after some evaluations; None if it
    came to its end first.
    """
    before = drivers.size(work)
    process = drivers.start(context, work)
    if rng.random() < 0.15:
        phase = "start"
        time.sleep(rng.uniform(0, 12.0 if work.ray else 0.5))
    else:  # as many evaluations as leave some for the kills to come, then a moment within one
        share = max(1.0, (work.evaluations - acknowledged(work)) / (left + 1))
        wanted = before + _LINE * round(_LINES * rng.uniform(0, 2 * share))
        drivers.wait_until(lambda: drivers.size(work) > wanted, process, _PATIENCE)
        phase = "evaluations"
        time.sleep(rng.uniform(0, 0.3 if work.ray else 0.008))
    process.kill()
    process.join()
    if process.exitcode == 1:
        raise SystemExit(f"a driver failed: see {work.folder / 'crashes'}")
    if process.exitcode != -signal.SIGKILL:
        return None
    after = drivers.size(work)
    return phase if after > before + 2 * _LINE else "replay" if after > before else "start"


def acknowledged(work: Work) -> int:
    """About how many evaluations are stored, by the length of the diary."""
    return drivers.size(work) // (_LINES * _LINE)


def is_over(work: Work) -> bool:
    """Whether a study came to its end."""
    try:
        db = sqlite3.connect(f"{work.store.absolute().as_uri()}?mode=ro", uri=True)
        row = db.execute("SELECT state FROM study").fetchone()
        db.close()
    except sqlite3.Error:
        return False
    return row is not None and row[0] == "done"


def _compared(work: Work, whole: Work) -> dict[str, Any]:
    ours, theirs = toy_study.rows(work.store), toy_study.rows(whole.store)
    differ = [table for table in sorted(ours.keys() | theirs.keys()) if ours.get(table) != theirs.get(table)]
    own, unbroken = toy_study.account(work), toy_study.account(whole)
    return {
        "evaluations": len(ours["evaluations"]),
        "trials": len(ours["trials"]),
        "acknowledged": own.acknowledged,
        "lost": own.lost,
        "repeated": own.repeated,
        "interleaved": own.interleaved,
        "in_flight": own.again,
        "begun": own.begun,
        "begun_unbroken": unbroken.begun,
        "differ": differ,
    }


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A table by pool."""
    kills = "SIGKILLs (at start / replaying / evaluating)"
    yield (
        f"| pool | evaluations | {kills} | acknowledged lost | acknowledged repeated | tables that differ "
        "from the unbroken run's |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for p in data["parts"]:
        d = p["during"]
        phases = f"{p['kills']} ({d['start']} / {d['replay']} / {d['evaluations']})"
        differ = ", ".join(p["differ"]) or "none"
        yield (
            f"| {p['pool']} | {p['evaluations']:,} | {phases} | {len(p['lost'])} of {p['acknowledged']:,} "
            f"| {len(p['repeated'])} | {differ} |"
        )


def failures(data: dict[str, Any]) -> list[str]:
    """What must not be."""
    return [
        f"{p['pool']}: {k} {str(p[k])[:200]}"
        for p in data["parts"]
        for k in ("lost", "repeated", "interleaved", "differ")
        if p[k]
    ]
