"""A search without models: its plan, its worker, and the life of one driver of it, as the soak kills and
races it.

Everything that happens is a line in the study's diary, in order: `begin` and `end` of an evaluation by a
worker, `ack` once another connection can read it in the store. Lines are appended whole and those that
acknowledge are synced to the disk.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.evaluation import Attempt, Evaluation, Items, Objective, Role, Term
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Opening, Plan, Progress, Stage, Study
from evomerge.spaces import baselines
from evomerge.store import Store, StudyFacts, item_set_id
from evomerge.workers import InProcessPool, Job, Pool
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, weight_space

SEED = 5
ITEMS: dict[Role, Items] = {
    "search": {"first": tuple(f"s{i}" for i in range(24)), "second": tuple(f"s{i}" for i in range(30))},
    "validation": {"first": tuple(f"v{i}" for i in range(20)), "second": tuple(f"v{i}" for i in range(20))},
    "test": {"first": tuple(f"t{i}" for i in range(20)), "second": tuple(f"t{i}" for i in range(20))},
}
TIMES = ("seconds", "created", "finished", "digest")  # a digest is of the times too
NOT_SEARCHED = ("attempts", "runs", "driven")  # what happened, not what was found: of no two runs the same


@dataclass(frozen=True, slots=True)
class Work:
    """What a driver is to do.

    folder: the study's; rate: of attempts that kill their worker, keyed by `seed`; ray: workers of a Ray
    pool, 0 for none; hold: seconds that an evaluation takes at least; references: most parents and hand
    recipes; population: of each generation.
    """

    folder: Path
    evaluations: int
    islands: int = 1
    ray: int = 0
    rate: float = 0.0
    seed: int = 0
    hold: float = 0.0
    references: int = 100
    population: int = 16

    @property
    def store(self) -> Path:
        """The study's file."""
        return self.folder / "study.db"

    @property
    def diary(self) -> Path:
        """What happened, a line each."""
        return self.folder / "diary"


def plan(work: Work) -> Plan:
    """Two stages of equal budget over four layers, 14 genes."""
    space = weight_space(groups=(2, 1, 1), embeddings=False, head=False)

    def stage(number: int, evaluations: int) -> Stage:
        def optimizer(start: Sequence[float], island: int) -> CmaEs:
            return CmaEs(start, 0.1, population=work.population, seed=SEED + 100 * number + island)

        return Stage("weights", evaluations, lambda start: Opening(space, optimizer, at_best=number > 0))

    half = work.evaluations // 2
    return Plan(
        stages=(stage(0, half), stage(1, work.evaluations - half)),
        baselines=baselines(space)[: work.references],
        objective=Objective((Term("first"), Term("second", 2.0))),
        items=ITEMS,
        per_generation=8,
        finalists=4,
        seed=SEED,
        islands=work.islands,
    )


def key(recipe_id: str, items: Items) -> str:
    """What an evaluation is known by in the diary."""
    return f"{recipe_id} {item_set_id(items)}"


def note(diary: Path, *words: object, sync: bool = False) -> None:
    """Appends a line; it is there when this returns, whoever is killed then."""
    handle = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


class Scorer:
    """A worker without a model: `toy.ToyPool`'s landscape, written into the diary.

    Some of its attempts kill its process.
    """

    def __init__(self, work: Work) -> None:
        self.work, self._toy = work, ToyPool()

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe, if the process outlives it."""
        work, known = self.work, key(recipe.id, items)
        note(work.diary, "begin", known, os.getpid())
        if work.rate:
            number = sum(line.startswith(f"begin {known} ") for line in work.diary.read_text().splitlines())
            if uniform(work.seed, known, number) < work.rate:
                note(work.diary, "dies", known, os.getpid(), number)
                os.kill(os.getpid(), signal.SIGKILL)
        if work.hold:
            time.sleep(work.hold)
        found = self._toy.evaluate(recipe, items)
        note(work.diary, "end", known, os.getpid())
        return found


class Acknowledging:
    """A pool that notes, before each result that it gives, what the store holds by then.

    Satisfies `evomerge.workers.pool.Pool`.
    """

    def __init__(self, pool: Pool, work: Work) -> None:
        self._pool, self._work, self._last = pool, work, 0
        acked = [line.split()[1:3] for line in _lines(work.diary) if line.startswith("ack ")]
        self._noted = {tuple(pair) for pair in acked}

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands them on."""
        self.acknowledge()
        self._pool.submit(jobs)

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The pool's."""
        self.acknowledge()
        return self._pool.result(timeout)

    def drain(self) -> None:
        """Drains the pool."""
        self._pool.drain()

    @property
    def out(self) -> int:
        """The pool's."""
        return self._pool.out

    def attempts(self) -> list[Attempt]:
        """The pool's."""
        return self._pool.attempts()

    def close(self) -> None:
        """Notes the last and closes the pool."""
        self.acknowledge()
        self._pool.close()

    def acknowledge(self) -> None:
        """Notes the evaluations that are new in the store, as another connection reads them."""
        db = sqlite3.connect(f"{self._work.store.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = db.execute(
                "SELECT id, recipe, item_set FROM evaluations WHERE id > ? ORDER BY id", (self._last,)
            ).fetchall()
        finally:
            db.close()
        for number, recipe, items in rows:
            self._last = number
            if (recipe, items) not in self._noted:
                self._noted.add((recipe, items))
                note(self._work.diary, "ack", recipe, items, os.getpid(), sync=True)


def drive(work: Work) -> str:
    """One process' life: begins or resumes the study and runs it to its end; what it ended in."""
    started = time.perf_counter()
    try:
        store = Store.open(work.store, write=True)
    except EvomergeError as error:
        note(work.folder / "refused", f"{os.getpid()} {time.perf_counter() - started:.4f} {error}")
        return "refused"
    with store:
        note(work.diary, "open", os.getpid())
        if store.study() is None:
            store.begin("soak", SEED, "study: soak\n", {}, StudyFacts())
        inner: Pool = InProcessPool(Scorer(work)) if not work.ray else _ray_pool(work)
        pool = Acknowledging(inner, work)
        try:
            Study(plan(work), store, pool, lambda progress: _shown(progress)).run()
            pool.acknowledge()
        finally:
            pool.close()
        note(work.diary, "close", os.getpid())
    return "done"


def _shown(progress: Progress) -> None:
    """Nobody looks."""


def _ray_pool(work: Work) -> Pool:
    import functools

    from evomerge.workers import Limits
    from evomerge.workers.ray_pool.pool import RayPool

    # workers die by chance here: no candidate is poison, no machine is broken, and none is waited for
    limits = (
        Limits(poison=1000, tries=1000, strikes=1000, breaker=1000, backoff=0.0) if work.rate else Limits()
    )
    return RayPool(functools.partial(Scorer, work), address="local", workers=work.ray, cpus=1, limits=limits)


def run(work: Work) -> None:
    """`drive` in a process of its own; what it raises is in the folder's `crashes`, what it says in `log`,
    and its exit code 1.
    """
    redirect(work)
    try:
        drive(work)
    except BaseException as error:
        import traceback

        note(work.folder / "crashes", os.getpid(), repr(error), "".join(traceback.format_exception(error)))
        raise SystemExit(1) from None


def redirect(work: Work) -> None:
    """Begins a process of the soak: its output goes to the folder's `log`, and it ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    handle = os.open(work.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _end_with_parent() -> None:
    """The soak was broken off: nobody is to go on with the study beside its next call."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


# ---- what is left ------------------------------------------------------------------------------------------


def rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Table -> what a search found, without times, whatever order results came in: a trial's evaluation by
    what it is of.
    """
    db = sqlite3.connect(file)
    db.row_factory = sqlite3.Row
    try:
        names = [
            row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        found = {
            n: [dict(row) for row in db.execute(f"SELECT * FROM {n} ORDER BY rowid")]
            for n in names
            if n not in NOT_SEARCHED
        }
    finally:
        db.close()
    known = {row["id"]: (row["recipe"], row["role"], row["item_set"]) for row in found["evaluations"]}
    for table in ("trials", "front"):
        for row in found[table]:
            row["evaluation"] = known[row["evaluation"]]
    for row in found["evaluations"]:
        del row["id"]
    plain = {
        t: [{k: v for k, v in row.items() if k not in TIMES} for row in part] for t, part in found.items()
    }
    for row in plain["study"]:
        row["state"] = "" if row["state"] == "running" else row["state"]
    return {table: part if table == "trials" else sorted(part, key=repr) for table, part in plain.items()}


def _lines(diary: Path) -> list[str]:
    return diary.read_text().splitlines() if diary.is_file() else []


@dataclass(frozen=True, slots=True)
class Account:
    """A diary read.

    repeated: evaluations begun once more after they were acknowledged; lost: acknowledged, and not stored;
    interleaved: lines of a driver between those of another; again: begun more than once, as those in flight
    at a kill are.
    """

    acknowledged: int
    begun: int
    repeated: list[str]
    lost: list[str]
    interleaved: list[str]
    again: int


def account(work: Work) -> Account:
    """What a study's diary says of it."""
    db = sqlite3.connect(work.store)
    stored = {f"{recipe} {items}" for recipe, items in db.execute("SELECT recipe, item_set FROM evaluations")}
    db.close()
    acked: set[str] = set()
    begun: Counter[str] = Counter()
    repeated, interleaved = [], []
    driver, over = "", set[str]()
    for line in _lines(work.diary):
        kind, *words = line.split()
        known = " ".join(words[:2])
        if kind == "begin":
            begun[known] += 1
            if known in acked:
                repeated.append(known)
        elif kind == "ack":
            acked.add(known)
        pid = words[0] if kind in ("open", "close") else words[2]
        if (kind in ("open", "ack", "close") or not work.ray) and pid != driver:
            over.add(driver)
            if pid in over or kind != "open":
                interleaved.append(line)
            driver = pid
    return Account(
        len(acked),
        sum(begun.values()),
        repeated,
        sorted(acked - stored),
        interleaved,
        sum(n > 1 for n in begun.values()),
    )
