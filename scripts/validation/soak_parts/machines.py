"""Machines that fail at 30 % of attempts, in each pool: the rows are those of a run in which nothing failed.

The limits are the defaults but for the seconds: what waits a minute there waits a second here.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.search import Study
from evomerge.store import Store, StudyFacts
from evomerge.workers import POOLS, Limits, PoolSettings
from scripts.validation.soak_parts import drivers, pieces, toy_study
from scripts.validation.soak_parts.toy_study import Work, key, note
from tests.support import landscape
from tests.support.landscape import uniform

FAULTS = ("no-space", "no-files", "no-memory", "killed", "frozen", "late")
ERRNOS = {"no-space": errno.ENOSPC, "no-files": errno.EMFILE, "no-memory": errno.ENOMEM}
LIMITS = Limits(floor=1.0, first=1.0, look=1.0, opening=60.0, backoff=0.02, longest_backoff=1.0)
LATE = 2.5 * LIMITS.floor  # seconds that a late start takes
MOST_STARTS = 200  # of a driver in one process, which dies of what kills a worker elsewhere


class Scorer:
    """Scores by the landscape on a machine that fails; everything is noted in the study's diary.

    What happens in an attempt is a function of candidate, items, number of the attempt and seed.
    """

    def __init__(self, work: Work, can_freeze: bool) -> None:
        self.work, self.faults = work, [f for f in FAULTS if can_freeze or f != "frozen"]
        self._fault = ""

    def prepare(self, recipe: Recipe, items: Items) -> None:
        """Begins an attempt; a late one takes longer than scoring may."""
        known = key(recipe.id, items)
        note(self.work.diary, "begin", known, os.getpid())
        number = sum(line.startswith(f"begin {known} ") for line in self.work.diary.read_text().splitlines())
        happens = uniform("happens", self.work.seed, known, number) < self.work.rate
        which = int(uniform("which", self.work.seed, known, number) * len(self.faults))
        self._fault = self.faults[which] if happens else ""
        if self._fault:
            note(self.work.diary, "fault", known, os.getpid(), self._fault)
        if self._fault == "late":
            threading.Event().wait(LATE)

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe, or ends by the fault of this attempt."""
        if self._fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._fault in ERRNOS:
            number = ERRNOS[self._fault]
            error = f"OSError: [Errno {number}] {os.strerror(number)}"
            return Evaluation(recipe.id, (), {}, {}, error=error)
        found = landscape.evaluation(recipe, items)
        note(self.work.diary, "end", key(recipe.id, items), os.getpid())
        return found


def drive(work: Work, name: str) -> None:
    """One process' life as the driver of a study in a pool; an exit code of 75 where its machine is ill."""
    toy_study.redirect(work)
    with Store.open(work.store, write=True) as store:
        if store.study() is None:
            store.begin("soak", toy_study.SEED, "study: soak\n", {}, StudyFacts())
        make = functools.partial(Scorer, work, name != "in-process")
        scorer = make()
        settings = PoolSettings(scorer, make, workers=2, address="local", cpus=1.0, limits=LIMITS)
        pool = POOLS[name].open(settings)
        try:
            Study(toy_study.plan(work), store, pool).run()
        finally:
            pool.close()


def run(
    folder: Path,
    *,
    evaluations: int,
    rate: float,
    seed: int,
    pools: Sequence[str],
    references: int = 100,
    population: int = 16,
) -> dict[str, Any]:
    """A study in each pool, compared with one on a machine that does not fail; those done before are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    of = drivers.context()
    of_all: dict[str, Any] = {"references": references, "population": population}
    whole = Work(folder / f"whole-{evaluations}", evaluations, **of_all)
    _lived(of, whole, "in-process")
    expected = toy_study.rows(whole.store)
    data: dict[str, Any] = {"evaluations": len(expected["evaluations"]), "rate": rate, "pools": []}
    for name in pools:
        file = folder / f"{name}-{100 * rate:g}-{evaluations}-{seed}.json"
        if not file.is_file():
            work = Work(file.with_suffix(""), evaluations, rate=rate, seed=seed, **of_all)
            started = time.monotonic()
            starts = _lived(of, work, name)
            found = _judged(work, expected) | {"pool": name, "starts": starts, "code": pieces.code()}
            pieces.write(file, found | {"seconds": time.monotonic() - started})
        data["pools"].append(pieces.read(file))
    return data


def _lived(of: Any, work: Work, name: str) -> int:
    """A study to its end; how often its driver was started."""
    work.folder.mkdir(exist_ok=True)
    for start in range(1, MOST_STARTS):
        process = of.Process(target=drive, args=(work, name))
        process.start()
        process.join()
        if process.exitcode == 0:
            return start
        if name != "in-process":
            raise SystemExit(f"a driver ended with {process.exitcode}; see {work.folder / 'log'}")
    raise SystemExit(f"a study does not end after {MOST_STARTS} starts; see {work.folder / 'log'}")


def _judged(work: Work, expected: dict[str, Any]) -> dict[str, Any]:
    ours = toy_study.rows(work.store)
    best, theirs = (json.loads(rows["study"][0]["outcome"])["best"] for rows in (ours, expected))
    db = sqlite3.connect(work.store)
    causes = dict(db.execute("SELECT cause, count(*) FROM attempts GROUP BY cause ORDER BY cause").fetchall())
    failed = db.execute("SELECT count(*) FROM evaluations WHERE error IS NOT NULL").fetchone()[0]
    db.close()
    lines = [line.split() for line in work.diary.read_text().splitlines()]
    tables = sorted(ours.keys() | expected.keys())
    return {
        "differ": [table for table in tables if ours.get(table) != expected.get(table)],
        "best": best == theirs,
        "begun": sum(words[0] == "begin" for words in lines),
        "faults": dict(Counter(words[-1] for words in lines if words[0] == "fault")),
        "causes": causes,
        "failed": failed,
    }


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A table by pool."""
    yield (
        "| pool | attempts begun | faults | attempts stored, by cause | drivers started | "
        "failed candidates | tables that differ | same best | seconds |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in data["pools"]:
        faults = ", ".join(f"{r['faults'].get(name, 0)} {name}" for name in FAULTS)
        causes = ", ".join(f"{count} {cause}" for cause, count in r["causes"].items())
        differ, best = ", ".join(r["differ"]) or "none", "yes" if r["best"] else "NO"
        yield (
            f"| {r['pool']} | {r['begun']} | {faults} | {causes} | {r['starts']} | {r['failed']} | "
            f"{differ} | {best} | {r['seconds']:.0f} |"
        )


def failures(data: dict[str, Any]) -> list[str]:
    """What must not be."""
    found = [f"{r['pool']}: {r['differ']} differ" for r in data["pools"] if r["differ"]]
    found += [f"{r['pool']}: {r['failed']} candidates failed" for r in data["pools"] if r["failed"]]
    return found + [f"{r['pool']}: another best" for r in data["pools"] if not r["best"]]
