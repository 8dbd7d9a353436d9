"""Measures how long `evomerge --help`, `status` and `show` take to start, and what they import.

    python scripts/benchmarks/startup.py [--runs 11] [--out results/startup.md]

Makes a small study of its own. For each command: the median and the least of so many runs in fresh processes,
the number of modules that it imports, and the slowest imports by `python -X importtime`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = "import sys; sys.argv[0] = 'evomerge'; from evomerge.cli import main; main()"
TARGETS = {"--help": 300, "status": 600, "show": 600}  # milliseconds, by the first word
TRIALS = 200  # of the study
TOP = 6  # imports that are listed


def make_study(root: Path) -> None:
    """A paused study of `TRIALS` candidates, written through the store."""
    from evomerge.evaluation import Evaluation, ItemScore
    from evomerge.recipes import Mix, Recipe
    from evomerge.store import NewTrial, Store, StudyFacts

    (root / "demo").mkdir()
    items = {"task": tuple(f"{i:016x}" for i in range(60))}
    with Store.open(root / "demo" / "study.db", write=True) as store:
        store.begin("demo", 0, "study: demo\n", {}, StudyFacts(tasks={"task": "0"}, metrics={"task": "acc"}))
        for number in range(TRIALS):
            value = number / TRIALS
            mix = Mix("linear", (("a", 0), ("b", 0)), params=(("weight", (value, 1 - value)),))
            outer = Mix("passthrough", (("a", None),))
            recipe = Recipe("a", (mix,), outer, outer)
            scores = tuple(ItemScore("task", item, value) for item in items["task"])
            store.add_trial(
                NewTrial(
                    generation=1 + number // 20,
                    slot=number % 20,
                    origin="sampled",
                    label=None,
                    genome=(value,),
                    parents=(),
                    recipe=recipe,
                    items=items,
                    evaluation=Evaluation(recipe.id, scores, {"task": value}, {"merge": 0.1, "score": 0.2}),
                    score=value,
                )
            )
        store.set_state("paused")


def run(words: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", CODE, *words],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )


def seconds(words: list[str], runs: int) -> list[float]:
    """Wall seconds of each run; one before them, which writes byte code, is not counted."""
    run(words)
    measured = []
    for _ in range(runs):
        start = time.perf_counter()
        run(words)
        measured.append(time.perf_counter() - start)
    return measured


def imports(words: list[str]) -> list[tuple[int, str]]:
    """(microseconds with what it imports itself, module) of every import."""
    rows = []
    for line in run(words, "-X", "importtime").stderr.splitlines():
        if line.startswith("import time:") and "cumulative" not in line:
            _, cumulative, module = line.removeprefix("import time:").split("|")
            rows.append((int(cumulative), module.strip()))
    return rows


def stamp() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("typer", "pydantic", "rich"))
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} cores, load {load:.2f}"
    return f"commit {commit}, Python {platform.python_version()}, {packages}; {machine}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        "# How long the command line takes to start",
        "",
        f"By `scripts/benchmarks/startup.py`; {stamp()}.",
        "",
    ]
    lines += ["| command | median ms | least ms | wanted | modules |", "| --- | ---: | ---: | ---: | ---: |"]
    details = []
    with tempfile.TemporaryDirectory() as folder:
        make_study(Path(folder))
        root = ["--root", folder]
        commands = [["--help"], ["status", "demo", *root], ["status", *root], ["show", "demo/best", *root]]
        for words in commands:
            name = " ".join(word for word in words if word not in root)
            times, modules = seconds(words, args.runs), imports(words)
            median, least = 1000 * statistics.median(times), 1000 * min(times)
            target = TARGETS[words[0]]
            lines.append(f"| `evomerge {name}` | {median:.0f} | {least:.0f} | < {target} | {len(modules)} |")
            top = ", ".join(f"{module} {us / 1000:.0f}" for us, module in sorted(modules, reverse=True)[:TOP])
            details.append(f"- `evomerge {name}`: {top}")
    lines += [
        "",
        "Slowest imports in ms, each with what it imports itself (`-X importtime`, which slows them):",
        "",
    ]
    text = "\n".join([*lines, *details]) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
