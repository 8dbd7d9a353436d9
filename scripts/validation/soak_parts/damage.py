"""Damaged study files: each is read as it was, or refused, or its check says so; no damage is silent.

The files are those of a toy study: one that is over, one whose driver was killed, with its log beside it, a
backup, and one that keeps a rollback journal. A case is a function of its name, such as 0/17.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import drivers, kills, pieces, toy_study
from scripts.validation.soak_parts.toy_study import Work

PIECE = 50
SECONDS = 30.0  # of processor time; a case that takes longer hangs
STATES = ("over", "killed", "backup", "journal")


# ---- what is damaged


def originals(folder: Path, evaluations: int) -> dict[str, Path]:
    """State -> folder of a whole store in it; made once."""
    found = {state: folder / state for state in STATES}
    if all((path / "study.db").is_file() for path in found.values()):
        return found
    shutil.rmtree(folder, ignore_errors=True)
    of = drivers.context()
    _lived(of, Work(found["over"], evaluations))
    killed = Work(found["killed"], 10 * evaluations)
    killed.folder.mkdir()
    process = drivers.start(of, killed)
    drivers.wait_until(lambda: kills.acknowledged(killed) > 3 * evaluations, process, 300)
    process.kill()
    process.join()
    shutil.copytree(found["over"], found["backup"])
    with toy_study.Store.open(found["backup"] / "study.db", write=True) as store:
        store.backup(found["backup"] / "copy.db")
    for file in found["backup"].iterdir():
        if file.name != "copy.db":
            file.unlink()
    (found["backup"] / "copy.db").rename(found["backup"] / "study.db")
    os.environ["EVOMERGE_JOURNAL"] = "DELETE"
    try:
        with toy_study.Store.open(_copied(found["over"], found["journal"]) / "study.db", write=True):
            pass
    finally:
        del os.environ["EVOMERGE_JOURNAL"]
    older = found["killed"].with_name("older")
    _lived(of, Work(older, evaluations // 2))
    return found


def _lived(of: Any, work: Work) -> None:
    work.folder.mkdir(parents=True)
    process = drivers.start(of, work)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the study to be damaged could not be made: see {work.folder / 'crashes'}")


def _copied(source: Path, to: Path) -> Path:
    """What belongs to a store, without the soak's own files."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for file in sorted(source.glob("study.*")):
        if not file.name.endswith((".lock", "-shm")):
            shutil.copy(file, to)
    return to


# ---- damage


def _flip(rng: random.Random, raw: bytearray) -> str:
    count = rng.choice([1, 1, 1, 2, 16])
    places = [rng.randrange(len(raw)) for _ in range(count)]
    for at in places:
        raw[at] ^= 1 << rng.randrange(8)
    return f"{count} bits flipped, at {places[:4]}"


def _truncate(rng: random.Random, raw: bytearray) -> str:
    size = rng.choice(
        [
            0,
            rng.randrange(len(raw)),
            4096 * rng.randrange(1 + len(raw) // 4096),
            len(raw) - rng.randrange(1, 100),
        ]
    )
    del raw[max(0, size) :]
    return f"truncated to {size}"


def _zero(rng: random.Random, raw: bytearray) -> str:
    first = 4096 * rng.randrange(1 + (len(raw) - 1) // 4096)
    end = min(len(raw), first + 4096 * rng.choice([1, 1, 3]))
    raw[first:end] = bytes(end - first)
    return f"zeroed from {first} to {end}"


def _swap(rng: random.Random, raw: bytearray) -> str:
    pages = len(raw) // 4096
    if pages < 2:
        return _flip(rng, raw)
    one, other = (4096 * p for p in rng.sample(range(pages), 2))
    raw[one : one + 4096], raw[other : other + 4096] = raw[other : other + 4096], raw[one : one + 4096]
    return f"pages at {one} and {other} swapped"


def _random(rng: random.Random, raw: bytearray) -> str:
    first = rng.randrange(len(raw))
    end = min(len(raw), first + rng.choice([1, 4, 50, 512]))
    raw[first:end] = rng.randbytes(end - first)
    return f"random bytes from {first} to {end}"


def _digit(rng: random.Random, raw: bytearray) -> str:
    """Another digit in the place of one: text that is text still."""
    for _ in range(1000):
        at = rng.randrange(len(raw))
        if 48 <= raw[at] <= 57:
            raw[at] = 48 + (raw[at] - 47) % 10
            return f"a digit changed at {at}"
    return _flip(rng, raw)


def _append(rng: random.Random, raw: bytearray) -> str:
    more = rng.choice([b"\0", b"x" * 100, bytes(4096), rng.randbytes(4096 * 3), bytes(raw[-4096:])])
    raw += more
    return f"{len(more)} bytes appended"


BYTES: tuple[Callable[[random.Random, bytearray], str], ...] = (
    _flip,
    _flip,
    _truncate,
    _zero,
    _swap,
    _random,
    _digit,
    _append,
)


def _whole(rng: random.Random, file: Path, older: Path) -> str:
    """Damage to whole files."""
    log = file.with_name(file.name + "-wal")
    alone = not file.with_name(file.name + ".rows").is_file()  # of a backup an older one is no damage
    action = rng.choice([0, *range(2 if alone else 1, 7)])
    if action == 0 and log.is_file():
        log.unlink()
        return "-wal deleted"
    if action == 1:
        shutil.copy(older / "study.db", file)
        return "an older file in its place"
    if action == 2:
        file.write_bytes(
            rng.choice(
                [b"", b"study: x\n", rng.randbytes(5000), b"SQLite format 3\0" + bytes(84), bytes(8192)]
            )
        )
        return "another file in its place"
    if action == 3:
        file.unlink()
        db = sqlite3.connect(file)
        db.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT)")
        db.close()
        return "another program's database in its place"
    if action == 4:
        log.write_bytes(rng.choice([b"", rng.randbytes(3000), bytes(4152)]))
        return "another -wal in its place"
    if action == 5:
        old, raw = (older / "study.db").read_bytes(), bytearray(file.read_bytes())
        first = 4096 * rng.randrange(min(len(old), len(raw)) // 4096)
        raw[first : first + 4096] = old[first : first + 4096]
        file.write_bytes(raw)
        return f"an older page at {first}"
    file.with_name(file.name + "-journal").write_bytes(
        rng.choice([b"", rng.randbytes(2000), bytes.fromhex("d9d505f920a163d7") + bytes(600)])
    )
    return "a foreign -journal beside it"


def damaged(rng: random.Random, folder: Path, older: Path) -> str:
    """Damages a store; in words what was done."""
    file = folder / "study.db"
    log = folder / "study.db-wal"
    if rng.random() < 0.2:
        return _whole(rng, file, older)
    target = log if log.is_file() and log.stat().st_size and rng.random() < 0.5 else file
    raw = bytearray(target.read_bytes())
    said = rng.choice(BYTES)(rng, raw)
    target.write_bytes(raw)
    return f"{target.name}: {said}"


# ---- what comes of it


def snapshot(store: Any) -> dict[str, Any]:
    """All that a store says of a search, by its own words."""
    trials = store.trials()
    recipes = sorted({t.recipe_id for t in trials})
    study = store.study()
    return {
        "study": study and dataclasses.replace(study, state="", name=""),
        "trials": trials,
        "scored": [store.scored(t) for t in trials],
        "recipes": [store.recipe(r).canonical() for r in recipes],
        "evaluations": [store.evaluations(r) for r in recipes],
        "front": [[t.id for t in store.front(role)] for role in ("search", "validation", "test")],
        "counts": store.count_evaluations(),
    }


def verdict(file: Path, before: dict[str, Any], write: bool) -> tuple[str, str]:
    """('correct' | 'refused' | 'found' | 'wrong', what was said).

    found: by `check`, where the file could be opened.
    """
    alone = not file.with_name(file.name + ".rows").is_file()

    def read() -> tuple[str, str]:
        with toy_study.Store.open(file, write=write) as store:
            checked = store.check()
            if checked != "ok":
                return "found", checked
            if (
                store.study() is None and alone
            ):  # an empty file: so does a driver leave it that is killed at its first step
                return "refused", "it holds no study"
            now = snapshot(store)
        differ = [name for name in before if before[name] != now[name]]
        return ("wrong", f"silent: {', '.join(differ)} differ") if differ else ("correct", "")

    return pieces.judged(read, SECONDS)


def case(
    name: str, sources: dict[str, Path], before: dict[str, dict[str, Any]], scratch: Path
) -> list[tuple[str, str, str, str]]:
    """(state, damage, verdict, what was said) of a damage, opened to read and opened to write."""
    out = []
    for write in (False, True):
        rng = random.Random(name)
        state = rng.choice(["killed", *STATES])
        folder = _copied(sources[state], scratch / "case")
        said = damaged(rng, folder, sources["killed"].with_name("older"))
        out.append(
            (
                f"{state}, {'written' if write else 'read'}",
                said,
                *verdict(folder / "study.db", before[state], write),
            )
        )
    return out


def run(folder: Path, *, damages: int, evaluations: int, seed: int) -> dict[str, Any]:
    """Damages copies of stores, some at a time; what was found before is kept."""
    sources = originals(folder / "stores", evaluations)
    state = folder / f"damage-{seed}.json"
    data = pieces.read(state) or {"damages": 0, "ends": {}, "found": [], "code": pieces.code()}
    pieces.watch()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        before = {}
        for name, source in sources.items():
            with toy_study.Store.open(_copied(source, Path(scratch) / "whole") / "study.db") as store:
                if (said := store.check()) != "ok":
                    raise SystemExit(f"the undamaged store '{name}' is found damaged: {said}")
                before[name] = snapshot(store)
        while data["damages"] < damages:
            for number in range(data["damages"], min(damages, data["damages"] + PIECE)):
                name = f"{seed}/{number}"
                for where, done, ended, said in case(name, sources, before, Path(scratch)):
                    own = data["ends"].setdefault(where, {"correct": 0, "refused": 0, "found": 0, "wrong": 0})
                    own[ended] += 1
                    if ended == "wrong":
                        data["found"].append([name, f"{where}: {done}: {said}"])
                        print(*data["found"][-1], sep=": ", flush=True)
            data["damages"] = min(damages, data["damages"] + PIECE)
            pieces.write(state, data)
    return data


def lines(data: dict[str, Any]) -> Iterator[str]:
    """A table by state of the store and how it was opened."""
    yield (
        "| store, opened to be | cases | rows as they were | refused at opening or reading | opened, and "
        "found by `check` | silent or a traceback |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for where, own in sorted(data["ends"].items()):
        yield (
            f"| {where} | {sum(own.values())} | {own['correct']} | {own['refused']} | {own['found']} | "
            f"{own['wrong']} |"
        )
