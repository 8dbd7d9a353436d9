"""Times merges of a ~0.5 B-parameter model: in place, to disk, and mergekit's on the same files; writes
results/bench_merge.md.

The base has random weights and the three "fine-tunes" are random perturbations of it: no language models, but
the same bytes to move. Each cell is the median of --repeats runs in one process with the files in the page
cache; a cell stops early, and says so, once --seconds are spent on it.

usage: python scripts/benchmarks/merge.py [--layers 24] [--repeats 5] [--seconds 150] [--threads 2] [--methods
    …] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, stored_dtype, total_bytes
from evomerge.merging import checkpoint_writer, merge
from evomerge.merging.weight_map import WeightMap
from evomerge.methods.fused import c_library
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import mergekit_yaml
from scripts.benchmarks import machine
from scripts.benchmarks.random_models import make_models

REPO = Path(__file__).resolve().parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.4},
    "task_arithmetic": {},
    "ties": {"density": [0.5, 0.6, 0.7]},
    "dare_ties": {"density": [0.5, 0.6, 0.7]},
    "della": {"density": [0.5, 0.6, 0.7], "epsilon": 0.15},
    "model_stock": {},
}
GOALS = ("linear", "task_arithmetic", "ties", "dare_ties")
MERGEKIT = """
import gc, json, shutil, statistics, sys, threading, time
import torch, yaml
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

torch.set_num_threads(int(sys.argv[1]))
repeats, budget = int(sys.argv[2]), float(sys.argv[3])
peak = 0
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
def watch(stop):
    global peak
    while not stop.wait(0.02):
        peak = max(peak, anonymous())
options = MergeOptions(lazy_unpickle=True, quiet=True, write_model_card=False, random_seed=1)
def in_memory(config):
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    config = config.model_copy(deep=True)
    shape = config.base_model.config()
    planner = MergePlanner(config, architecture, options=options, out_model_config=shape)
    planner._plan()  # plan_in_memory makes tasks of an abstract class and fails in 0.1.5
    tasks = [task for _, task in planner._tensors]
    held = []
    for task, value in Executor(targets=tasks, math_device="cpu", storage_device="cpu").run(quiet=True):
        held.append(value)
    assert len(held) > 10
def to_disk(config, out):
    run_merge(config.model_copy(deep=True), out, options)
for file, out in json.load(sys.stdin):
    row = {}
    for kind in ("memory", "disk"):
        times, spent, peak = [], 0.0, 0
        while len(times) < repeats and (not times or spent < budget):
            shutil.rmtree(out, ignore_errors=True)
            config = MergeConfiguration.model_validate(yaml.safe_load(open(file)))
            gc.collect()
            before, stop = anonymous(), threading.Event()
            thread = threading.Thread(target=watch, args=(stop,)); thread.start()
            start = time.perf_counter()
            try:
                in_memory(config) if kind == "memory" else to_disk(config, out)
            except Exception as error:
                row[kind] = {"error": f"{type(error).__name__}: {error}"}
                times = None
            took = time.perf_counter() - start
            stop.set(); thread.join()
            if times is None:
                break
            times.append(took); spent += took
            top = max(row.get(kind, {}).get("peak", 0), peak - before)
            row[kind] = {"seconds": statistics.median(times), "runs": len(times), "peak": top}
    shutil.rmtree(out, ignore_errors=True)
    print("ROW" + json.dumps({"file": file, **row}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument(
        "--rows",
        type=Path,
        help="keep what is measured here; run again with the same file, it goes on from there",
    )
    parser.add_argument("--out", type=Path, default=REPO / "results" / "bench_merge.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = measure(Path(scratch), args)
    args.out.write_text(report(rows, args))
    print(args.out.read_text())


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    models = make_models(scratch, args.layers)
    parents = {str(path): Checkpoint(path) for path in models}
    nbytes = total_bytes(parents[str(models[0])])
    for parent in parents.values():  # into the page cache
        for name in parent.tensors:
            parent.tensor(name).view(torch.int16).sum()
    recipes = {method: recipe(method, models, scratch) for method in args.methods}
    kept = json.loads(args.rows.read_text()) if args.rows and args.rows.is_file() else {}
    rows: dict[str, Any] = {"bytes": nbytes, "parameters": nbytes // 2, "methods": kept}
    resident = WeightMap(skeleton(models[0]), parents[str(models[0])].tensors)
    known = MagnitudeTables(build=True, ranks_bytes=8 << 30)
    for method, file in recipes.items():
        if method in kept:
            continue
        found = mergekit_yaml.load(
            _yaml.read(file),
            lambda name: parents[name].layout.num_layers,
            lambda name: stored_dtype(parents[name]),
        )
        row: dict[str, Any] = {"models": len(found.models)}
        row["copy"] = copy_bandwidth()
        start = time.perf_counter()
        merge.merge_into(found, parents, resident, known)
        row["first"] = time.perf_counter() - start
        row["in place"] = timed(lambda found=found: merge.merge_into(found, parents, resident, known), args)
        row["to disk"] = timed(
            lambda found=found: checkpoint_writer.write(found, parents, scratch / "out"),
            args,
            lambda: shutil.rmtree(scratch / "out", True),
        )
        shutil.rmtree(scratch / "out", ignore_errors=True)
        rows["methods"][method] = row
        keep(rows, args)
        print(method, json.dumps(row), flush=True)
    environment = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit") / "bin" / "python"
    if not args.no_mergekit and environment.is_file():
        jobs = [
            [str(file), str(scratch / "theirs")]
            for method, file in recipes.items()
            if "mergekit" not in rows["methods"][method]
        ]
        program = [str(environment), "-c", MERGEKIT, str(args.threads), str(args.repeats), str(args.seconds)]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
            for line in process.stdout:
                if line.startswith("ROW"):
                    theirs = json.loads(line[3:])
                    rows["methods"][Path(theirs.pop("file")).stem]["mergekit"] = theirs
                    keep(rows, args)
                    print(line[3:].strip(), flush=True)
    return rows


def keep(rows: dict[str, Any], args: argparse.Namespace) -> None:
    if args.rows:
        args.rows.write_text(json.dumps(rows["methods"]))


def skeleton(path: Path) -> torch.nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def recipe(method: str, models: list[Path], scratch: Path) -> Path:
    own = dict(METHODS[method])
    density = own.pop("density", None)
    count = 1 if method == "slerp" else 3
    entries = []
    for i, path in enumerate(models[1 : 1 + count]):
        given = {} if method in ("slerp", "model_stock") else {"weight": [0.5, 0.6, 0.7][i]}
        entries.append(
            {"model": str(path), "parameters": given | ({"density": density[i]} if density else {})}
        )
    data = {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": entries,
        "parameters": own,
        "dtype": "bfloat16",
        "out_dtype": "bfloat16",
    }
    if method == "linear":  # three models, none of them the base
        data["base_model"] = str(models[1])
    file = scratch / f"{method}.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes read and written a second by torch's copy of 1 GB, median of 7."""
    source = torch.ones(1 << 29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[1:])


def timed(
    run: Callable[[], object], args: argparse.Namespace, before: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    times: list[float] = []
    peak = 0
    while len(times) < args.repeats and (not times or sum(times) < args.seconds):
        before()
        with peak_memory() as found:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        peak = max(peak, found[0])
    return {"seconds": statistics.median(times), "runs": len(times), "peak": peak}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Growth of anonymous memory while it is open; mapped files are the page cache's."""
    found, stop, start = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not stop.wait(0.02):
            found[0] = max(found[0], anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def anonymous() -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def report(rows: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [
        "# Merging a ~0.5 B-parameter model", "",
        f"`python scripts/benchmarks/merge.py --threads {args.threads} --repeats {args.repeats} --seconds "
        f"{args.seconds:g}`, "
        f"{machine.stamp('torch', 'transformers')}, {args.threads} threads, mergekit 0.1.5; C pass: "
        f"{'yes' if c_library.library() else 'no'}.", "",
        f"Base and three random perturbations (no fine-tunes), {rows['parameters'] / 1e6:.0f} M parameters, "
        "bf16, files in the page cache. Medians; "
        "GB/s counts parents read and output written; peak is the growth of anonymous memory (0 where the "
        "process held it already). `first` is the "
        "first candidate of a search, which builds the tables; a cell that used up its time before the last "
        "repeat names its number of runs.", "",
        "| method | copy GB/s | first s | in place s | GB/s | of copy | peak MB | to disk s | peak MB | "
        "mergekit in memory s | peak MB | "
        "mergekit to disk s | peak MB | in place / in memory | to disk / to disk |",
        "| --- " * 15 + "|",
    ]  # fmt: skip
    for method, row in rows["methods"].items():
        moved = rows["bytes"] * (row["models"] + 1)
        place, disk, theirs = row["in place"], row["to disk"], row.get("mergekit", {})
        rate = moved / place["seconds"]
        cells = [
            method,
            f"{row['copy'] / 1e9:.1f}",
            f"{row['first']:.1f}",
            said(place, args, 3),
            f"{rate / 1e9:.1f}",
            f"{rate / row['copy']:.0%}",
        ]
        cells += [f"{place['peak'] / 1e6:.0f}", said(disk, args, 2), f"{disk['peak'] / 1e6:.0f}"]
        for kind in ("memory", "disk"):
            found = theirs.get(kind, {})
            cells += (
                [said(found, args, 2), f"{found['peak'] / 1e6:.0f}"]
                if "seconds" in found
                else [found.get("error", "not run")[:60], ""]
            )
        for kind, ours in (("memory", place), ("disk", disk)):
            found = theirs.get(kind, {})
            cells.append(f"{found['seconds'] / ours['seconds']:.1f} ×" if "seconds" in found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def said(cell: dict[str, Any], args: argparse.Namespace, digits: int) -> str:
    return f"{cell['seconds']:.{digits}f}" + (
        f" ({cell['runs']} runs)" if cell["runs"] < args.repeats else ""
    )


if __name__ == "__main__":
    sys.exit(main())
