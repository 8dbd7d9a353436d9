"""Weights, routes, both, and routes at random, on the zoo at one budget of scored items: `python
scripts/benchmarks/routes.py [--seeds 5]`.

Each arm is a whole study from the command line, with its hand recipes, validation and test; several seeds,
two at a time. Writes results/routes.md; studies that are already there are gone on with or read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scipy import stats

from scripts.benchmarks import machine

REPO = Path(__file__).resolve().parents[2]
MODELS = "".join(
    f"  {name}: {REPO / 'results' / 'zoo' / name}\n" for name in ("base", "math", "lang", "string")
)
SEARCH = """study: {name}
models:
{models}base: base
method: task_arithmetic
out_dtype: float32
stages: [{stages}]
routes: {{layers: [4, 10], perplexity_screen: {{tokens: 300}}, {routes}}}
space:
  groups: 3
  components: [attention, mlp]
  parameters:
    weight: {{low: -0.5, high: 2.5, start: 1.0}}
tasks:
  - task: zoo_arithmetic
  - task: zoo_lookup
  - task: zoo_string
  - task: zoo_cross
evaluation: {{splits: declared, items: 40, batch_size: 256, validation: 150, test: 400}}
search: {{population: 24, sigma: 0.1, seed: {seed}}}
"""
WEIGHTS, ROUTES = "{{stage: weights, evaluations: {}}}", "{{stage: routes, evaluations: {}}}"
FIXED = "start: lang, embeddings: start"  # as published: those of the model that speaks the language
ARMS: dict[
    str, tuple[str, tuple[tuple[str, float], ...], str]
] = {  # arm -> (what it is, its stages with their shares of the budget, routes)
    "ps": ("weights, CMA-ES", ((WEIGHTS, 1.0),), "scales: none"),
    "random-fixed": ("routes at random", ((ROUTES, 1.0),), f"optimizer: random, {FIXED}"),
    "dfs-fixed": ("routes, choices, elitist evolution", ((ROUTES, 1.0),), FIXED),
    "catcma-fixed": ("routes, choices, CatCMA", ((ROUTES, 1.0),), f"optimizer: cma, {FIXED}"),
    "cma-fixed": (
        "routes, choices as numbers, CMA-ES",
        ((ROUTES, 1.0),),
        f"genome: conditional, optimizer: cma, {FIXED}",
    ),
    "indicator": (
        "routes, indicators, CMA-ES",
        ((ROUTES, 1.0),),
        f"genome: indicator, optimizer: cma, {FIXED}",
    ),
    "random": ("routes and embeddings at random", ((ROUTES, 1.0),), "optimizer: random"),
    "dfs": ("routes and embeddings, elitist evolution", ((ROUTES, 1.0),), "genome: categorical"),
    "ps-dfs": ("weights, then routes and embeddings", ((WEIGHTS, 0.5), (ROUTES, 0.5)), "genome: categorical"),
}


def study(arm: str, seed: int, evaluations: int, root: Path) -> dict[str, object]:
    """Runs one study, or reads it, and returns its outcome."""
    _, stages, routes = ARMS[arm]
    name = f"{arm}-{seed}"
    file = root / f"{name}.yaml"
    written = ", ".join(text.format(round(evaluations * share)) for text, share in stages)
    file.write_text(SEARCH.format(name=name, models=MODELS, stages=written, routes=routes, seed=seed))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "EVOMERGE_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "evomerge", "run", str(file), "--resume", "--root", str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
    status = [
        sys.executable,
        "-c",
        "from evomerge.cli import main; main()",
        "status",
        name,
        "--json",
        "--root",
        str(root),
    ]
    found: dict[str, object] = json.loads(
        subprocess.run(status, env=environment, capture_output=True, text=True, check=True).stdout
    )
    print(f"{time.strftime('%H:%M:%S')} {name}: {found['best']['test']:.3f}", flush=True)  # type: ignore[index]
    return found


def interval(values: list[float]) -> str:
    """'0.500 ± 0.012': mean and half of the 95 % interval of the mean, by Student's t over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return (
        f"{mean:.3f} ± "
        f"{stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)):.3f}"
    )


def best(found: dict[str, object], origin: str) -> float:
    """The highest test score among the parents or the hand-written."""
    return max(r["test"] for r in found["references"] if r["origin"] == origin and r.get("test") is not None)  # type: ignore[attr-defined]


Outcomes = dict[str, list[dict[str, object]]]  # arm -> the state of its study, a seed each


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first", type=int, default=20, help="the first seed; elitist evolution was tuned on seeds below 20"
    )
    parser.add_argument("--evaluations", type=int, default=240)
    parser.add_argument("--root", type=Path, default=REPO / "results" / "routes")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first, args.first + args.seeds)
    jobs = [(arm, seed) for seed in seeds for arm in args.arms]
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(lambda job: study(*job, args.evaluations, args.root), jobs))
    of_job = dict(zip(jobs, states, strict=True))
    outcomes = {arm: [of_job[arm, seed] for seed in seeds] for arm in args.arms}
    tests = {arm: [o["best"]["test"] for o in own] for arm, own in outcomes.items()}  # type: ignore[index]
    lines = [*heading(args), *table(outcomes, tests, args.root), *by_seed(tests, seeds)]
    (REPO / "results" / "routes.md").write_text("\n".join(lines) + "\n")


def heading(args: argparse.Namespace) -> list[str]:
    """What was run."""
    flags = f"--first {args.first} --seeds {args.seeds} --evaluations {args.evaluations}"
    return [
        "# Weights, routes, and both, on the zoo",
        "",
        f"`python scripts/benchmarks/routes.py {flags}`,",
        f"{machine.stamp('torch', 'transformers', 'lm_eval', 'cma', 'cmaes', 'numpy')}.",
        "",
        f"Each study: {args.evaluations} candidates x 160 search items (parents and recipes by hand not "
        "counted),",
        f"600 validation items, 1,600 test items, float32, seeds {args.first} to "
        f"{args.first + args.seeds - 1}. Mean",
        "of four skills. ± is half of a 95 % interval of the mean over seeds (Student's t); it holds the "
        "search's",
        "chance, not the items', which are the same for all (a study's own test score has a standard error "
        "of",
        "about .01).",
        "",
    ]


def table(outcomes: Outcomes, tests: dict[str, list[float]], root: Path) -> list[str]:
    """A row for each arm."""
    parent = best(next(iter(outcomes.values()))[0], "parent")
    lines = [
        "| | test | over the best parent | over routes at random | over its best hand-written recipe "
        "| search - test | layers of the best |",
        "| --- " * 7 + "|",
        f"| best parent | {parent:.3f} | | | | | 6 |",
    ]
    for arm, own in outcomes.items():
        over_parent = [t - best(o, "parent") for t, o in zip(tests[arm], own, strict=True)]
        over_hand = [t - best(o, "hand") for t, o in zip(tests[arm], own, strict=True)]
        bias = [o["best"]["search"] - t for t, o in zip(tests[arm], own, strict=True)]  # type: ignore[index]
        cells = [
            ARMS[arm][0],
            interval(tests[arm]),
            interval(over_parent),
            over_random(arm, tests),
            interval(over_hand),
            interval(bias),
            ", ".join(str(depth(o, root)) for o in own),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over_random(arm: str, tests: dict[str, list[float]]) -> str:
    """The lead over routes at random in the same setting, paired by seed; '' where there is none to
    compare.
    """
    other = "random" if arm in ("dfs", "ps-dfs") else "random-fixed"
    if other not in tests or arm in ("ps", "random", other):
        return ""
    return interval([a - b for a, b in zip(tests[arm], tests[other], strict=False)])


def by_seed(tests: dict[str, list[float]], seeds: range) -> list[str]:
    """The test scores of every study, and routes after weights over weights alone."""
    lines = [
        "",
        "By seed:",
        "",
        "| | " + " | ".join(str(s) for s in seeds) + " |",
        "| --- " * (len(seeds) + 1) + "|",
    ]
    for arm, own in tests.items():
        lines.append(f"| {ARMS[arm][0]} | " + " | ".join(f"{t:.3f}" for t in own) + " |")
    if {"ps", "ps-dfs"} <= set(tests):
        lead = interval([a - b for a, b in zip(tests["ps-dfs"], tests["ps"], strict=True)])
        lines += ["", f"Weights then routes over weights alone, paired by seed: {lead}."]
    return lines


def depth(outcome: dict[str, object], root: Path) -> int:
    """Layers of the winner."""
    command = [
        sys.executable,
        "-c",
        "from evomerge.cli import main; main()",
        "show",
        f"{outcome['study']}/best",
        "--json",
        "--root",
        str(root),
    ]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(shown["costs"].get("layers", 6))


if __name__ == "__main__":
    main()
