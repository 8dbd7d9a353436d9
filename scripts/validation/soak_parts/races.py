"""Two drivers started together on one study, again and again: one runs, the other is refused at once and says
who runs.
"""

from __future__ import annotations

import random
import re
import shutil
import socket
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import drivers, pieces, toy_study
from scripts.validation.soak_parts.toy_study import Work

PIECE = 10
_PATIENCE = 120.0  # seconds for a driver to begin or to be refused
_RACES = 50  # on one study, which must not come to its end
_EVALUATIONS = 15  # that the winner goes on to make beside the one that was refused
_FRESH = 3  # every third race is for a study that is not there yet


def _racer(work: Work, barrier: Barrier, delay: float) -> None:
    barrier.wait()
    time.sleep(delay)
    toy_study.run(work)


def run(folder: Path, *, races: int, evaluations: int, seed: int) -> dict[str, Any]:
    """Races until there are as many as asked; at the end of each the winner is killed, and what both did is
    read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / f"races-{seed}.json"
    data = pieces.read(state) or {
        "races": 0,
        "one": 0,
        "wrong": [],
        "slowest": 0.0,
        "fresh": 0,
        "code": pieces.code(),
    }
    of = drivers.context()
    while data["races"] < races:
        for number in range(data["races"], min(races, data["races"] + PIECE)):
            work = Work(folder / f"study-{seed}-{number // _RACES}", evaluations)
            if fresh := number % _FRESH == 0:
                work = Work(folder / f"fresh-{seed}", evaluations)
                shutil.rmtree(work.folder, ignore_errors=True)
            work.folder.mkdir(exist_ok=True)
            wrong, seconds = _race(of, work, random.Random(f"{seed}/{number}"))
            data["one"] += not wrong
            data["fresh"] += fresh
            data["slowest"] = max(data["slowest"], seconds)
            data["wrong"] += [[number, said] for said in wrong]
            for said in wrong:
                print(f"{seed}/{number}: {said}", flush=True)
        data["races"] = min(races, data["races"] + PIECE)
        pieces.write(state, data)
    return data


def _race(of: Any, work: Work, rng: random.Random) -> tuple[list[str], float]:
    """(what was not as it must be, seconds from the loser's call until it was refused)."""
    refused = work.folder / "refused"
    refused.unlink(missing_ok=True)
    before = drivers.size(work)
    barrier = of.Barrier(2)
    late = rng.uniform(0, 0.05) * (rng.random() < 0.5)
    both = [drivers.start(of, work, _racer, barrier, delay) for delay in rng.sample([0.0, late], 2)]
    try:
        over = time.monotonic() + _PATIENCE
        while time.monotonic() < over and not any(p.exitcode is not None for p in both):
            time.sleep(0.002)
        after = drivers.size(work)  # the winner is to go on after the loser has ended
        alive = [p for p in both if p.exitcode is None]
        if len(alive) == 1:
            drivers.wait_until(lambda: drivers.size(work) > after + 120 * _EVALUATIONS, alive[0], 20)
    finally:
        for process in both:
            process.kill()
            process.join()
    return _judged(work, both, before, refused)


def _judged(work: Work, both: list[Any], before: int, refused: Path) -> tuple[list[str], float]:
    wrong = []
    pids = {str(p.pid) for p in both}
    lines = work.diary.read_bytes()[before:].decode().splitlines() if work.diary.is_file() else []
    ran = {line.split()[1] for line in lines if line.startswith("open ")}
    if len(ran) != 1 or not ran < pids:
        wrong.append(f"{len(ran)} of the two ran")
    if (work.folder / "crashes").is_file():
        wrong.append(f"a driver failed: {(work.folder / 'crashes').read_text()[:300]}")
    said = refused.read_text().splitlines() if refused.is_file() else []
    if len(said) != 1:
        return [*wrong, f"{len(said)} of the two were refused"], 0.0
    pid, seconds, error = said[0].split(" ", 2)
    if {pid} | ran != pids:
        wrong.append("the one that was refused is not the one that did not run")
    if float(seconds) >= 1:
        wrong.append(f"refused after {seconds} seconds")
    if not all(re.search(rf"\b{re.escape(word)}\b", error) for word in (socket.gethostname(), *ran)):
        wrong.append(f"refused without host and pid of the one that runs: {error}")
    account = toy_study.account(work)
    wrong += [f"interleaved: {account.interleaved[:3]}"] if account.interleaved else []
    wrong += (
        [f"{len(account.repeated)} evaluations repeated, {len(account.lost)} lost"]
        if account.repeated or account.lost
        else []
    )
    return wrong, float(seconds)


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A sentence."""
    yield (
        f"{data['races']} races ({data['fresh']} for a study that was not there yet): in {data['one']} of "
        "them one driver ran and the other was"
    )
    yield (
        "refused, naming host and pid; no line of the two drivers interleaved. The slowest refusal took "
        f"{data['slowest']:.2f} s from the call."
    )
