"""Workers that die in the middle of an attempt, more and more of them: the trajectory and the best stay the
same.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import drivers, kills, pieces, toy_study
from scripts.validation.soak_parts.toy_study import Work


def run(
    folder: Path, *, rates: Sequence[float], evaluations: int, seed: int, references: int = 100
) -> dict[str, Any]:
    """A study with two Ray workers for each rate, compared with one in a single process; those done before
    are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of = drivers.context()
    whole = Work(folder / f"whole-{evaluations}", evaluations, islands=2, references=references)
    _lived(of, whole)
    expected = toy_study.rows(whole.store)
    data: dict[str, Any] = {"evaluations": len(expected["evaluations"]), "rates": []}
    for rate in rates:
        file = folder / f"rate-{100 * rate:g}-{evaluations}-{seed}.json"
        if not file.is_file():
            work = Work(
                file.with_suffix(""),
                evaluations,
                islands=2,
                ray=2,
                rate=rate,
                seed=seed,
                references=references,
            )
            started = time.monotonic()
            _lived(of, work)
            pieces.write(
                file,
                _judged(work, expected)
                | {"rate": rate, "seconds": time.monotonic() - started, "code": pieces.code()},
            )
        data["rates"].append(pieces.read(file))
    return data


def _lived(of: Any, work: Work) -> None:
    """A study to its end; a driver that fails ends the soak."""
    work.folder.mkdir(exist_ok=True)
    if not kills.is_over(work):
        process = drivers.start(of, work)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"a driver ended with {process.exitcode}; see {work.folder / 'crashes'}")


def _judged(work: Work, expected: dict[str, Any]) -> dict[str, Any]:
    ours = toy_study.rows(work.store)
    best, theirs = (json.loads(rows["study"][0]["outcome"])["best"] for rows in (ours, expected))
    db = sqlite3.connect(work.store)
    causes = dict(db.execute("SELECT cause, count(*) FROM attempts GROUP BY cause ORDER BY cause").fetchall())
    db.close()
    counts = Counter(line.split()[0] for line in work.diary.read_text().splitlines())
    account = toy_study.account(work)
    return {
        "differ": [
            table for table in sorted(ours.keys() | expected.keys()) if ours.get(table) != expected.get(table)
        ],
        "best": best == theirs,
        "begun": counts["begin"],
        "died": counts["dies"],
        "causes": causes,
        "lost": account.lost,
        "repeated": account.repeated,
    }


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A table by rate."""
    yield (
        "| deaths per attempt | begun | workers that died | attempts stored, by cause | tables that "
        "differ | same best | acknowledged repeated |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in data["rates"]:
        causes = ", ".join(f"{count} {cause}" for cause, count in r["causes"].items())
        differ, best = ", ".join(r["differ"]) or "none", "yes" if r["best"] else "NO"
        yield (
            f"| {r['rate']:.0%} | {r['begun']} | {r['died']} | {causes} | {differ} | {best} | "
            f"{len(r['repeated'])} |"
        )


def failures(data: dict[str, Any]) -> list[str]:
    """What must not be."""
    found = [
        f"rate {r['rate']:g}: {k} {str(r[k])[:200]}"
        for r in data["rates"]
        for k in ("differ", "lost", "repeated")
        if r[k]
    ]
    return found + [f"rate {r['rate']:g}: another best" for r in data["rates"] if not r["best"]]
