#!/usr/bin/env python3
"""Odd command lines in three locales, and hostile model folders: one sentence and an exit code each.

usage: python scripts/validation/edges.py [--cases 2000] [--folders 100] [--seed 0] [--out results/edges.md]

Wrong is: E000 or a traceback, a signal, more than 10 s of a processor (90 s in all), an error of more than
one line or with words of the library that checks settings, a mark that code of a model folder leaves. Most
cases run in a fork of a process that has imported everything, one in 50 as a program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from scripts.benchmarks import machine  # noqa: E402
from scripts.validation.edges_parts import cases  # noqa: E402
from scripts.validation.edges_parts.cases import Case  # noqa: E402
from scripts.validation.edges_parts.server import WALL_SECONDS  # noqa: E402

ZOO = REPOSITORY / "results" / "zoo"
EXIT_CODES = {0, 2, 3, 4, 5, 75}
OTHERS_WORDS = re.compile(
    r"pydantic|validation error|input_value|input_type|For further information|Input should|Traceback|Errno"
)
_SERVERS = 2  # processes of each locale
_OWN = 50  # one case of so many is a program of its own


def search_file(**more: Any) -> dict[str, Any]:
    """A search of a few candidates over two small models."""
    return {
        "study": "done",
        "models": {name: str(ZOO / name) for name in ("base", "math")},
        "base": "base",
        "method": "task_arithmetic",
        "space": {"groups": 1, "components": ["mlp"], "embeddings": False, "head": False},
        "tasks": [{"task": "zoo_arithmetic", "weight": 1.0}],
        "evaluation": {"splits": "declared", "items": 4, "validation": 4, "test": 4, "batch_size": 8},
        "search": {"evaluations": 4, "population": 4, "sigma": 0.1, "finalists": 1},
    } | more


def recipe_file(model: Path) -> dict[str, Any]:
    """A mergekit recipe over a model and the zoo's base."""
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (ZOO / "base", model)]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def environment(locale: str) -> dict[str, str]:
    """What a case runs under."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))
    }
    own = {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "EVOMERGE_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }
    kept.pop("RAY_ADDRESS", None)
    return kept | own | cases.LOCALES[locale]


class Server:
    """A process that runs cases in forks of itself; started again where it ends."""

    def __init__(self, locale: str) -> None:
        self._locale = locale
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        program = [sys.executable, "-P", "-m", "scripts.validation.edges_parts.server"]
        pipe, own = subprocess.PIPE, environment(self._locale)
        return subprocess.Popen(
            program, cwd=REPOSITORY, env=own, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, folder: Path, case: Case) -> dict[str, Any]:
        """What a case printed and its exit code."""
        wanted = {"folder": str(folder), "words": case.words, "variables": case.variables}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process = self._start()
            return {"code": -1, "ended": "its process ended", "seconds": 0.0, "out": "", "err": ""}
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def run_alone(folder: Path, case: Case, locale: str) -> dict[str, Any]:
    """The same in a process of its own, which may only wait longer."""
    own = environment(locale) | {k: v for k, v in case.variables.items() if v is not None}
    for name in [k for k, v in case.variables.items() if v is None]:
        own.pop(name, None)
    program = [sys.executable, "-P", "-c", "from evomerge.cli import main; main()", *case.words]
    began, ended = time.monotonic(), ""
    try:
        done = subprocess.run(
            [word.encode("utf-8", "surrogateescape") for word in program],
            cwd=folder,
            env={k.encode(): v.encode("utf-8", "surrogateescape") for k, v in own.items()},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, out, err, ended = -9, error.stdout or b"", error.stderr or b"", "hang"
    coding = cases.LOCALES[locale]["PYTHONIOENCODING"]
    return {
        "code": code,
        "ended": ended,
        "seconds": time.monotonic() - began,
        "out": out.decode(coding, "backslashreplace"),
        "err": err.decode(coding, "backslashreplace"),
    }


def fault(found: dict[str, Any]) -> str:
    """What is wrong with the end of a case; empty for nothing."""
    err, code = str(found["err"]), int(found["code"])
    if found["ended"]:
        return str(found["ended"])
    if "E000" in err + found["out"] or "Traceback" in err:
        return "E000"
    if code not in EXIT_CODES:
        return f"exit code {code}"
    if code in (0, 75):
        return ""
    lines = [line for line in err.splitlines() if line.strip()]
    if not lines:
        return "" if str(found["out"]).strip() else "no message"  # doctor says it as its result
    if OTHERS_WORDS.search(err):
        return "words of a library"
    errors = [i for i, line in enumerate(lines) if line.startswith("error[E")]
    is_help = lines[0].startswith("Usage: ")  # no verb is given
    if not is_help and errors != [len(lines) - 1]:
        return "not one line at the end"
    if "\x1b" in err + found["out"]:
        return "an escape sequence"
    return ""


# ---- the folder of a case ----------------------------------------------------------------------------------


@contextmanager
def place(case: Case, done: Path, scratch: Path) -> Iterator[tuple[Path, Case]]:
    """The folder of a case, and the case with the paths of what is in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{case.kind}{case.number}-", dir=scratch))
    try:
        (folder / "results").mkdir()
        shutil.copytree(done, folder / "results" / "done")
        model = ZOO / "math"
        if case.kind == "model":
            model = folder / "model"
            cases.hostile_model(ZOO / "math", model, case.change, folder.with_name(folder.name + "-mark"))
        document = search_file(study="new")
        document["models"]["math"] = str(model)
        if case.kind == "search":
            document = cases.changed_search(document, case.change)
        (folder / "search.yaml").write_text(json.dumps(document), encoding="utf-8", errors="replace")
        (folder / "recipe.yaml").write_text(json.dumps(recipe_file(model)), encoding="utf-8")
        names = _odd_files(folder)
        words = tuple(names.get(word, word) for word in case.words)
        variables = {k: names.get(v, v) if v is not None else None for k, v in case.variables.items()}
        yield folder, Case(case.number, case.kind, words, variables, case.change)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _odd_files(folder: Path) -> dict[str, str]:
    """Makes what odd values stand for: word -> path."""
    paths = {
        "LINK": folder / "link",
        "DANGLING": folder / "dangling",
        "FOLDER": folder / "folder",
        "FILE": folder / "file.yaml",
        "BINARY": folder / "binary.yaml",
        "HUGE": folder / "huge.yaml",
        "LOOP": folder / "loop",
        "SOCKET": folder / "pipe",
        "SEARCH": folder / "search.yaml",
        "RECIPE": folder / "recipe.yaml",
        "OUT": folder / "out",
    }
    paths["FOLDER"].mkdir()
    paths["LINK"].symlink_to(paths["FOLDER"])
    paths["DANGLING"].symlink_to(folder / "gone" / "x")
    paths["FILE"].write_text("just text\n")
    paths["BINARY"].write_bytes(bytes(range(256)) * 4)
    with paths["HUGE"].open("wb") as opened:
        opened.truncate(1 << 40)
    paths["LOOP"].symlink_to(paths["LOOP"])
    os.mkfifo(paths["SOCKET"])
    return {word: str(path) for word, path in paths.items()}


def make_done(scratch: Path) -> Path:
    """A finished study."""
    file = scratch / "done.yaml"
    file.write_text(json.dumps(search_file()))
    program = [sys.executable, "-P", "-c", "from evomerge.cli import main; main()", "run", str(file)]
    done = subprocess.run(
        [*program, "--root", str(scratch / "studies"), "--accept-floor"],
        env=environment("UTF-8"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the study that cases are about cannot be made: {done.stderr[-2000:]}")
    return scratch / "studies" / "done"


# ---- the whole ---------------------------------------------------------------------------------------------


def run_all(count: int, folders: int, seed: int, verbose: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(what was wrong, counts by locale and outcome) of all cases; the locales run side by side."""
    wrong: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    every = [cases.case(number, seed) for number in range(count)]
    every += [cases.model_case(number, seed) for number in range(folders)]
    with tempfile.TemporaryDirectory(prefix="edges-") as kept:
        scratch = Path(kept)
        done = make_done(scratch)
        processes = _SERVERS * len(cases.LOCALES)

        def run_locale(position: int) -> None:
            locale = tuple(cases.LOCALES)[position % len(cases.LOCALES)]
            server = Server(locale)
            for case in every[position::processes]:
                found = _run(case, locale, server, done, scratch)
                counts.update(found["counted"])
                if found["why"]:
                    wrong.append(found)
                    print(f"{found['why']}: {locale} {found['case'][:300]}", flush=True)
                    print(f"  {found['err'][-400:]!r}", flush=True)
                elif verbose:
                    print(f"{found['code']} {found['seconds']:.1f} {case.words}", flush=True)
            server.close()

        with ThreadPoolExecutor(processes) as threads:
            list(threads.map(run_locale, range(processes)))
    return wrong, counts


def _run(case: Case, locale: str, server: Server, done: Path, scratch: Path) -> dict[str, Any]:
    """What came of a case, 'why' it is wrong, and what is counted of it."""
    alone = case.number % _OWN == 3 and case.kind != "model"
    with place(case, done, scratch) as (folder, placed):
        found = run_alone(folder, placed, locale) if alone else server.run(folder, placed)
        has_run = folder.with_name(folder.name + "-mark").exists()
    why = "code ran" if has_run else fault(found)
    ending = "wrong" if why else "done" if found["code"] == 0 else "refused"
    counted = [f"{locale}|{name}" for name in ("cases", ending, why, "programs" if alone else "") if name]
    return found | {"why": why, "locale": locale, "case": case.to_json(), "counted": counted}


def report(
    wrong: list[dict[str, Any]], counts: Counter[str], arguments: argparse.Namespace, began: float
) -> str:
    """The text of results/edges.md."""
    program = "python scripts/validation/edges.py"
    lines = [
        "# Odd command lines and hostile model folders",
        "",
        f"Written by `{program} --cases {arguments.cases} --folders {arguments.folders} "
        f"--seed {arguments.seed}`, {(time.time() - began) / 60:.0f} minutes; "
        f"{machine.stamp('torch', 'transformers', 'lm-eval', 'typer')}.",
        "",
        "Refused: one line, `error[E...]`, and an exit code of 2, 3, 4 or 5. Wrong: E000 or a",
        "traceback, a signal, a hang (10 s of a processor, 90 s in all), several lines, words of a library,",
        "an escape sequence, code of a model folder that ran.",
        "",
        "| locale | cases | as programs of their own | done | refused | wrong | E000 | hangs | code run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in cases.LOCALES:
        kinds = ("cases", "programs", "done", "refused", "wrong", "E000", "hang", "code ran")
        lines.append(f"| {name} | {' | '.join(str(counts[f'{name}|{kind}']) for kind in kinds)} |")
    lines += [f"- {one['why']}: {one['locale']}, `{one['case'][:200]}`" for one in wrong]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the cases and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--folders", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    began = time.time()
    wrong, counts = run_all(arguments.cases, arguments.folders, arguments.seed, arguments.verbose)
    text = report(wrong, counts, arguments, began)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
