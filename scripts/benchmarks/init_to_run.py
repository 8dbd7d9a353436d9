"""Seconds from `evomerge init` to the table of a finished search of the zoo's models, with no file written by
hand; writes results/init_to_run.md.

usage: python -m scripts.benchmarks.init_to_run [--evaluations N] [--out FILE]   (needs the trained zoo)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
ZOO = REPOSITORY / "results" / "zoo"
MODELS = ("base", "math", "lang", "string")
TASKS = ("zoo_arithmetic", "zoo_string", "zoo_lookup")
WANTED = 180


def main() -> None:
    """Runs both commands in an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "init_to_run.md")
    args = parser.parse_args()
    models = [word for name in MODELS for word in ("--model", str(ZOO / name))]
    tasks = [word for name in TASKS for word in ("--task", name)]
    include = ["--include", str(REPOSITORY / "evaluators")]
    budget = ["--evaluations", str(args.evaluations)]
    commands = {
        "init": ["init", "search.yaml", *models, *tasks, *include, *budget],
        "run": ["run", "search.yaml", "--allow-tasks", "--workers", str(os.cpu_count() or 1)],
    }
    load, seconds = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands.items():
            began = time.monotonic()
            command = [sys.executable, "-m", "evomerge", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            seconds[name] = time.monotonic() - began
            if done.returncode:
                sys.exit(done.stderr)
    verdict = next(line for line in done.stdout.splitlines() if " on test " in line)
    lines = [
        "# From init to a finished search",
        "",
        f"By `python -m scripts.benchmarks.init_to_run`: `evomerge init` with {len(MODELS)} models of the",
        f"zoo and {len(TASKS)} of its tasks, {args.evaluations} evaluations, then `evomerge run` of what",
        f"it wrote, a worker a core; one run, load {load:.1f} before it.",
        "",
        f"{machine.stamp('torch', 'transformers', 'lm-eval')}.",
        "",
        "| | seconds |",
        "| --- | ---: |",
        *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
        f"| both (wanted: < {WANTED}) | {sum(seconds.values()):.0f} |",
        "",
        f"Its verdict: {verdict}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
