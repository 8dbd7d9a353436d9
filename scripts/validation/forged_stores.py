"""Forged and damaged stores through the verbs that read a study; writes results/edges_stores.md.

Each case is the folder of a finished toy study beside a whole one, with one thing changed: bytes, objects,
scores (with digests that are right), values, JSON, names or files. In a child with a limit of ten seconds
`status`, `status STUDY`, `show STUDY/best`, `show STUDY/ID` and an opening for writing must each end with a
result or with one line that is no bug, the whole study must be listed, and no check may call a store 'ok'
whose scores its items contradict, as an oracle of this file computes them. A case is a function of its name,
such as 0/scores/17: --case runs it alone.

usage: python scripts/validation/forged_stores.py [--cases 500] [--seed 0] [--out results/edges_stores.md]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.evaluation import Objective, Term
from evomerge.search import Study
from evomerge.store import Store, StudyFacts, TermFacts, integrity, score_check
from scripts.benchmarks.machine import stamp
from tests.support.toy import ToyPool, in_process
from tests.support.toy_search import plan

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 10
WEIGHTS = {"first": 1.0, "second": 2.0}
FORGED = "forged"
JSON_COLUMNS = (
    *(("study", name) for name in ("facts", "outcome", "overrides")),
    *(("trials", name) for name in ("genome", "parents")),
    *(("evaluations", name) for name in ("metrics", "scores", "seconds", "costs", "probabilities")),
    *((table, "body") for table in ("recipes", "item_sets")),
    ("front", "point"),
)
ODD: tuple[Any, ...] = (
    *(None, 0, -1, 1, 10**18, -(2**63), 0.5, 1e308, float("inf"), "", " ", "no", "é", "\x1b[2J", "a\nb"),
    *("\x00", "🂡" * 50, "x" * 100_000, b"\xff\xfe", b"", "../../x", "null", "{}", "[]"),
)
DEEP = ("[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 3000 + "]" * 3000, "9" * 5000)
NAMES = (
    *("a b", "a%20b", "-x", "--help", "é", "x" * 200, "a\nfake: done, best 0.999", "\x1b[31mred", "..."),
    *("a'b", 'a"b', "a#b?c", "\u202egnp", "CON", "study.db"),
)


# ---- the studies -------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """A finished study over the toy landscape, with the facts of a real one."""
    objective = Objective(tuple(Term(task, weight) for task, weight in WEIGHTS.items()))
    facts = StudyFacts(
        tasks=dict.fromkeys(WEIGHTS, "hash"),
        metrics=dict.fromkeys(WEIGHTS, "acc"),
        terms={task: TermFacts(1, True, (), ((task, 1.0),)) for task in WEIGHTS},
        objective=score_check.objective_facts(objective),
    )
    folder.mkdir(parents=True)
    with Store.open(folder / "study.db", write=True) as store:
        store.begin(folder.name, 5, "study: trial\n", {}, facts)
        Study(plan(objective=objective), store, ToyPool()).run()
        store.backup()


def contradicted(file: Path) -> bool:
    """Whether a score is not what its items make: the oracle, of sums and SQLite alone."""
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as db:
        sets = {i: json.loads(body) for i, body in db.execute("SELECT id, body FROM item_sets")}
        made: dict[tuple[str, str], list[float]] = {}
        sql = "SELECT recipe, role, item_set, metrics, scores, reported, score, error FROM evaluations"
        for recipe, role, items, metrics, scores, reported, score, error in db.execute(sql):
            if error is not None:
                continue
            values, first, means = json.loads(scores), 0, {}
            for task, ids in sets[items]:
                means[task] = math.fsum(values[first : first + len(ids)]) / len(ids)
                first += len(ids)
            total = sum(WEIGHTS[task] * mean for task, mean in means.items()) / sum(WEIGHTS.values())
            numbers = [*json.loads(metrics).values(), reported, score]
            wanted = [*(means[task] for task in json.loads(metrics)), total, total]
            if any(abs(a - b) > 1e-5 for a, b in zip(numbers, wanted, strict=True)):
                return True
            made.setdefault((recipe, role), []).append(total)
        outcome = json.loads(db.execute("SELECT outcome FROM study").fetchone()[0])
    lines = [outcome["best"], *outcome["references"], *outcome["finalists"]]
    told = [
        (line["recipe"], role, line[role])
        for line in lines
        for role in ("validation", "test")
        if role in line
    ]
    return any(
        min((abs(value - x) for x in made.get((recipe, role), ())), default=1.0) > 1e-5
        for recipe, role, value in told
    )


# ---- what is changed ---------------------------------------------------------------------------------------


def sql(file: Path, *statements: tuple[str, tuple[Any, ...]], sealed: bool = True) -> None:
    """Runs SQL on a store; sealed: makes the digests anew."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA ignore_check_constraints = ON")
        for statement, values in statements:
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(statement, values)
        for table in integrity.SEALED if sealed else ():
            for row in db.execute(f"SELECT rowid AS number FROM {table}").fetchall():
                integrity.seal(db, table, row["number"])
        db.commit()


def bytes_changed(rng: random.Random, file: Path) -> None:
    """A bit, a cut, zeros, a swap of pages or a tail."""
    content = bytearray(file.read_bytes())
    size, kind, at = len(content), rng.randrange(5), rng.randrange(len(content))
    first = at // 4096 * 4096
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[first : first + 4096] = bytes(4096)
    elif kind == 3:
        other = rng.randrange(size) // 4096 * 4096
        content[first : first + 4096], content[other : other + 4096] = (
            content[other : other + 4096],
            content[first : first + 4096],
        )
    else:
        content += rng.randbytes(rng.randrange(1, 9000))
    file.write_bytes(content)


def objects(rng: random.Random, file: Path) -> None:
    """Triggers, views, tables, indexes; a view in the place of a table."""
    table = rng.choice(["study", "trials", "evaluations", "front", "attempts", "runs"])
    raised = "UPDATE evaluations SET score = 0.999, reported = 0.999"
    choices = (
        [f"CREATE TRIGGER t{rng.randrange(9)} AFTER INSERT ON {table} BEGIN {raised}; END"],
        [f"CREATE TRIGGER t BEFORE UPDATE ON {table} BEGIN {raised}; END"],
        [f"CREATE VIEW v AS SELECT * FROM {table}"],
        ["CREATE TABLE more (x)"],
        [f"CREATE UNIQUE INDEX i ON {table} (digest)"],
        [f"ALTER TABLE {table} RENAME TO other", f"CREATE VIEW {table} AS SELECT * FROM other"],
        [f"ALTER TABLE {table} ADD COLUMN more REAL DEFAULT 0.999"],
        ["CREATE VIRTUAL TABLE words USING fts5(x)"],
        [f"PRAGMA user_version = {rng.choice([0, 1, 3, 5, 7, 99, -1])}"],
        ["DROP INDEX trials_by_recipe"],
    )
    sql(file, *((statement, ()) for statement in rng.choice(choices)), sealed=False)


def scores(rng: random.Random, file: Path) -> None:
    """Scores, metrics, items, the outcome, or which evaluation is a trial's, each with a right digest."""
    value = rng.choice([0.999, 1.0, 0.0, -1.0, 7.5, 1e9])
    row = "id = (SELECT id FROM evaluations ORDER BY random() LIMIT 1)"
    best = "recipe = (SELECT json_extract(outcome, '$.best.recipe') FROM study)"
    where = rng.choice([row, best])
    line = rng.choice(["best", "references[0]", "references[1]", "finalists[0]"])
    choices: tuple[tuple[str, tuple[Any, ...]], ...] = (
        (f"UPDATE evaluations SET metrics = json_set(metrics, '$.first', ?) WHERE {where}", (value,)),
        (f"UPDATE evaluations SET reported = ? WHERE {where}", (value,)),
        (f"UPDATE evaluations SET score = ?, reported = ? WHERE {where}", (value, value)),
        (f"UPDATE evaluations SET scores = replace(scores, '0.0', '1.0') WHERE {where}", ()),
        (f"UPDATE study SET outcome = json_set(outcome, '$.{line}.test', ?)", (value,)),
        (f"UPDATE study SET outcome = json_set(outcome, '$.{line}.validation', ?)", (value,)),
        ("UPDATE trials SET evaluation = (SELECT max(id) FROM evaluations WHERE role = 'search')", ()),
        (f"UPDATE evaluations SET scores = '[]' WHERE {where}", ()),
        (f"UPDATE evaluations SET item_set = (SELECT id FROM item_sets LIMIT 1) WHERE {where}", ()),
    )
    sql(file, rng.choice(choices))


def values(rng: random.Random, file: Path) -> None:
    """Any value in any column of a row, or of all rows."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        tables = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = rng.choice(tables)
        column = rng.choice([row[1] for row in db.execute(f"PRAGMA table_info({table})")])
    some = rng.choice(["", f" WHERE rowid = (SELECT min(rowid) FROM {table})"])
    sql(file, (f"UPDATE {table} SET {column} = ?{some}", (rng.choice(ODD),)), sealed=column != "digest")


def deep(rng: random.Random, file: Path) -> None:
    """JSON nested deep, of a wrong form or cut, in a column of JSON."""
    table, column = rng.choice(JSON_COLUMNS)
    text = rng.choice([*DEEP, "{", "7", '"x"', "[1]", "{}", '{"best": {}}', '{"best": {"id": []}}', "[[]]"])
    sql(file, (f"UPDATE {table} SET {column} = ?", (text,)))


def names(rng: random.Random, file: Path) -> None:
    """Odd names of the folder, the study and its candidates."""
    name = rng.choice(NAMES)
    kind = rng.randrange(3)
    if kind == 0:
        file.parent.rename(file.parent.with_name(name))
    elif kind == 1:
        sql(file, ("UPDATE study SET name = ?, config = ?", (name, f"study: {name}")))
    else:
        sql(
            file, ("UPDATE trials SET label = ?, origin = ? WHERE id < 4", (name, rng.choice(["hand", name])))
        )


def files(rng: random.Random, file: Path) -> None:
    """Files that are gone, are something else, or are of others."""
    name = rng.choice(
        ["study.db", "study.db.rows", "study.db.lock", "study.backup.db", "stop", "study.db-wal"]
    )
    path = file.with_name(name)
    if not path.is_dir():
        path.unlink(missing_ok=True)
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        path.write_bytes(rng.randbytes(5000))
    elif kind == 5:
        path.write_text("0" * 16)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "bytes": bytes_changed,
    "objects": objects,
    "scores": scores,
    "values": values,
    "json": deep,
    "names": names,
    "files": files,
}


# ---- a case ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a case ended: 'read', 'refused' or 'wrong', and what was said."""

    how: str
    said: str


def verbs(root: Path, study: str) -> list[tuple[str, int, str, str]]:
    """(verb, exit code, output, error) of everything that reads the study, and an opening for writing."""
    given = (
        ("status",),
        ("status", "--", study),
        ("show", "--", f"{study}/best"),
        ("show", "--", f"{study}/3"),
    )
    found = [(" ".join(words), *in_process(words[0], "--root", root, *words[1:])) for words in given]
    try:
        Store.open(root / study / "study.db", write=True).close()
        found.append(("open", 0, "", ""))
    except EvomergeError as error:
        found.append(("open", error.exit_code, "", f"error[{error.code}] {error}"))
    return found


def judged(root: Path, study: str) -> End:
    """Runs the verbs and judges what they say."""
    refused = ""
    for verb, code, out, err in verbs(root, study):
        lines = [line for line in err.splitlines() if line]
        if code not in (0, 2, 3) or "E000" in err or "Traceback" in err:
            return End("wrong", f"{verb}: exit {code}: {err[-300:]}")
        if (code or verb == "status") and any(not re.match(r"error\[E\d+\] ", line) for line in lines):
            return End("wrong", f"{verb}: not one line: {err[-300:]}")
        if not (out + err).replace("\n", "").replace("\t", "").isprintable():
            return End("wrong", f"{verb}: signs that a terminal obeys")
        if verb == "status" and "whole: done" not in out:
            return End("wrong", f"{verb}: the other study is not listed: {err[-300:]}")
        if lines or "damaged" in out:
            refused = refused or (err or out)[-200:]
    if refused:
        return End("refused", refused)
    if contradicted(root / study / "study.db"):
        return End("wrong", "a score that its items contradict is ok")
    return End("read", "")


def run(name: str, originals: Path) -> End:
    """One case in a child, which is killed after ten seconds."""
    _, kind, _ = name.split("/")
    rng = random.Random(name)
    root = Path(tempfile.mkdtemp(prefix="forged-"))
    reading, writing = os.pipe()
    try:
        shutil.copytree(originals / "whole", root / "whole")
        shutil.copytree(originals / "whole", root / FORGED)
        KINDS[kind](rng, root / FORGED / "study.db")
        (study,) = (path.name for path in root.iterdir() if path.name != "whole")
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(SECONDS)
                end = judged(root, study)
                os.write(writing, json.dumps([end.how, end.said[:3000]]).encode())
            except BaseException as error:
                os.write(writing, json.dumps(["wrong", f"{type(error).__name__}: {error}"[:3000]]).encode())
            finally:
                os._exit(0)
        started = time.monotonic()
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            return End(
                "wrong", f"ended by signal {os.WTERMSIG(status)} after {time.monotonic() - started:.0f} s"
            )
        return End(*json.loads(os.read(reading, 1 << 16)))
    finally:
        os.close(reading)
        os.close(writing)
        shutil.rmtree(root, ignore_errors=True)


# ---- the table ---------------------------------------------------------------------------------------------


def report(seed: int, total: int, ends: Counter[tuple[str, str]], wrong: list[tuple[str, str]]) -> str:
    """The file that is written."""
    rows = [
        f"| {kind} | {sum(ends[kind, how] for how in ('read', 'refused', 'wrong'))} | {ends[kind, 'read']} | "
        f"{ends[kind, 'refused']} | {ends[kind, 'wrong']} |"
        for kind in KINDS
    ]
    lines = [
        "# Forged and damaged stores",
        "",
        f"Written by `python scripts/validation/forged_stores.py --cases {total} --seed {seed}`: stores",
        "with bytes, objects, scores (digests made anew), values, JSON, names or files changed, through",
        "`status`, `show` and an opening for writing, ten seconds each. Read: all is said and an oracle",
        "finds no score that its items contradict. Refused: one line that is no bug. Wrong: anything else.",
        "",
        f"{stamp()}.",
        "",
        "| changed | cases | read | refused | wrong |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        *(["", *(f"- `{name}` {' '.join(said.split())}" for name, said in wrong)] if wrong else []),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(REPOSITORY / "results" / "edges_stores.md"))
    parser.add_argument("--case", help="one case by its name, shown whole")
    args = parser.parse_args()
    originals = Path(tempfile.mkdtemp(prefix="forged-"))
    try:
        make(originals / "whole")
        for verb in (("status",), ("show", "whole/best")):  # imports what they need, once
            assert in_process(*verb, "--root", originals)[0] == 0
        if args.case:
            print(run(args.case, originals))
            return
        ends: Counter[tuple[str, str]] = Counter()
        wrong: list[tuple[str, str]] = []
        for number in range(args.cases):
            kind = list(KINDS)[number % len(KINDS)]
            name = f"{args.seed}/{kind}/{number // len(KINDS)}"
            end = run(name, originals)
            ends[kind, end.how] += 1
            if end.how == "wrong":
                wrong.append((name, end.said))
                print(name, end.said, sep=": ", flush=True)
    finally:
        shutil.rmtree(originals, ignore_errors=True)
    text = report(args.seed, args.cases, ends, wrong)
    Path(args.out).write_text(text)
    print(text)
    if wrong:
        sys.exit(f"{len(wrong)} cases went wrong; run one again with --case NAME")


if __name__ == "__main__":
    main()
