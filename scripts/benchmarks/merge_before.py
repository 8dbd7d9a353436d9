"""Times candidates of a search beside those of an earlier commit; writes results/merge_before.md.

Two processes, one of each commit, take turns: for each method a search begins anew (the first candidate
measures what a search measures of its parents once), then come candidates with other numbers, all merged into
one live model. The parents are random perturbations of a random base, of the shapes of Qwen2-0.5B with fewer
layers. Ratios are of processor seconds, the least of all rounds, so that other work on the machine counts
little; seconds by the clock stand beside them.

usage: git worktree add /tmp/before COMMIT; python scripts/benchmarks/merge_before.py /tmp/before [--layers 4]
    [--vocabulary 32768] [--rounds 3] [--later 3] [--threads 2] [--methods …] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Checkpoint
from scripts.benchmarks import machine
from scripts.benchmarks.random_models import make_models

REPO = Path(__file__).resolve().parents[2]
GOALS = dict.fromkeys(("slerp", "nuslerp", "multislerp", "model_stock", "karcher"), (1.0, 1.8))
GOALS |= dict.fromkeys(("ties", "della"), (3.0, 1.0))
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": True},
    "dare_linear": {"density": True},
    "dare_ties": {"density": True},
    "breadcrumbs": {"density": True, "gamma": 0.01},
    "breadcrumbs_ties": {"density": True, "gamma": 0.01},
    "della": {"density": True, "epsilon": 0.15},
    "della_linear": {"density": True, "epsilon": 0.15},
    "slerp": {},
    "nuslerp": {},
    "nuslerp by rows": {"nuslerp_flatten": 0.0},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "model_stock by rows": {"filter_wise": 1.0},
    "sce": {},
    "ram": {},
    "ramplus_tl": {},
    "nearswap": {},
    "arcee_fusion": {},
}
PROGRAM = """
import json, logging, os, sys, time
from pathlib import Path
import torch, transformers
transformers.utils.logging.disable_progress_bar()
from evomerge.checkpoints import Checkpoint
from evomerge.merging.live_model import ModelBuilder
from evomerge.methods import METHODS
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.merging.model_loading import load_base
from evomerge.recipes import Mix, Recipe, params
folder, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
parents = {name: Checkpoint(folder / name) for name in ("base", "one", "two", "three")}
model = load_base(parents["base"], "bfloat16")
layers = parents["base"].layout.num_layers
try:
    from evomerge.merging.parent_placement import keep_small
    parents = keep_small(parents, "base")  # as a worker does
except ImportError:
    pass
for parent in parents.values():  # into the page cache
    for name in parent.tensors:
        parent.tensor(name).view(torch.int16).sum()
def recipe(name, own, number):
    rule = METHODS[name.split()[0]]
    least, most = rule.models
    sources = ("one", "two", "three")[: min(3, most)]
    given = {key: value for key, value in own.items() if key != "density"}
    if rule.param("weight"):
        given["weight"] = tuple(0.3 + 0.1 * i + 0.01 * number for i in range(len(sources)))
    if own.get("density"):
        given["density"] = tuple(round(0.4 + 0.1 * i + 0.013 * number, 3) for i in range(len(sources)))
    if rule.param("t"):
        given["t"] = 0.4 + 0.01 * number if name == "slerp" else 0.0001
    if rule.param("gamma"):
        given["gamma"] = tuple(0.01 + 0.0003 * number for _ in sources)
    if rule.param("epsilon") and rule.param("epsilon").per == "model":
        given["epsilon"] = (own["epsilon"],) * len(sources)
    mixes = [
        Mix(
            rule.name,
            tuple((source, layer) for source in sources),
            ("base", layer) if rule.needs_base else None,
            params(given),
        )
        for layer in (*range(layers), None)
    ]
    return Recipe("base", tuple(mixes[:-1]), mixes[-1], mixes[-1], seed=3)
for line in sys.stdin:
    name, own, later = json.loads(line)
    builder = ModelBuilder(parents, parents, "base", model, "bfloat16", "cpu",
                           MagnitudeTables(build=True, ranks_bytes=8 << 30))
    times = []
    for number in range(1 + later):
        wanted = recipe(name, own, number)
        clock, spent = time.perf_counter(), time.process_time()
        builder.build(wanted)
        times.append((time.process_time() - spent, time.perf_counter() - clock))
    digest = sum(int(p.detach().view(torch.int16).long().sum()) for p in model.parameters())
    print("ROW" + json.dumps([times, digest]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--later", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=REPO / "results" / "merge_before.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        models = make_models(Path(scratch), args.layers, args.vocabulary, args.hidden)
        parameters = sum(prod(info.shape) for info in Checkpoint(models[0]).tensors.values())
        trees = [args.before.resolve(), REPO]
        processes = [start(tree, Path(scratch), args.threads) for tree in trees]
        lines = head(args, parameters)
        for name in args.methods:
            rounds = [[ask(process, name, args.later) for process in processes] for _ in range(args.rounds)]
            lines.append(row(name, rounds))
            args.out.write_text("\n".join(lines) + "\n")
            print(lines[-1], flush=True)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def start(tree: Path, folder: Path, threads: int) -> subprocess.Popen[str]:
    """A process that merges with the code of a tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(threads)]
    return subprocess.Popen(
        command, env=environment, cwd=tree, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def ask(process: subprocess.Popen[str], name: str, later: int) -> tuple[list[tuple[float, float]], int]:
    """((processor seconds, seconds) of the first candidate and the later ones, a sum of the last's bits)."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([name, METHODS[name], later]) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("ROW"):
            times, digest = json.loads(line[3:])
            return times, digest
    raise SystemExit(f"the process that merges by {name} ended")


def head(args: argparse.Namespace, parameters: int) -> list[str]:
    before = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=args.before, capture_output=True, text=True, check=True
    ).stdout.strip()
    return [
        "# Candidates beside those of an earlier commit", "",
        f"`python scripts/benchmarks/merge_before.py WORKTREE --layers {args.layers} --vocabulary "
        f"{args.vocabulary} --hidden {args.hidden} --rounds {args.rounds} --later {args.later} --threads "
        f"{args.threads}`, {machine.stamp('torch')}; before: commit {before}.", "",
        f"Base and three random perturbations, {parameters / 1e6:.0f} M parameters, bf16, files in the page "
        f"cache, {args.threads} threads; both commits take turns in one run. First: the first candidate of a "
        "search. Later: candidates after it, with other numbers. CPU s: processor seconds, the least of "
        f"{args.rounds} rounds; s: by the clock, likewise, with whatever else ran. Times: before / now, of "
        "processor seconds. Same bits: whether both commits' last candidates are alike.", "",
        "| method | first CPU s before | now | times | later CPU s before | now | times | first s before "
        "| now | later s before | now | same bits | goals |",
        "| --- " * 13 + "|",
    ]  # fmt: skip


def row(name: str, rounds: Sequence[Sequence[tuple[list[tuple[float, float]], int]]]) -> str:
    least: list[
        list[float]
    ] = []  # of each commit: first and later processor seconds, first and later seconds
    for tree in range(2):
        taken = [times for times, _ in (each[tree] for each in rounds)]
        least.append(
            [min(t[0][unit] for t in taken) for unit in range(2)]
            + [min(x[unit] for t in taken for x in t[1:]) for unit in range(2)]
        )
    before, now = least
    first, later = before[0] / now[0], before[2] / now[2]
    goals = GOALS.get(name, (1.0, 1.0))
    cells = [
        name,
        *(f"{before[0]:.2f}", f"{now[0]:.2f}", f"{first:.2f}"),
        *(f"{before[2]:.3f}", f"{now[2]:.3f}", f"{later:.2f}"),
        *(f"{before[1]:.2f}", f"{now[1]:.2f}", f"{before[3]:.3f}", f"{now[3]:.3f}"),
        "yes" if len({each[tree][1] for each in rounds for tree in range(2)}) == 1 else "no",
        f"{goals[0]:g}, {goals[1]:g}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
