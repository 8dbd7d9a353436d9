"""Times merges, routes and searches on a GPU; writes results/bench_gpu.md.

Scoring beside lm-eval: scripts/benchmarks/evaluation.py --device cuda.

Merges and routes are of models of ~0.5 B parameters with random weights, as in scripts/benchmarks/merge.py;
searches are those of scripts/benchmarks/search.py on the zoo, on the GPU and on one thread of the same
machine's processor.

usage: python scripts/benchmarks/gpu.py [--only merge routes search] [--device cuda] [--layers 24] [--repeats
    9] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, stored_dtype, total_bytes
from evomerge.merging import merge
from evomerge.merging.parent_placement import place_parent
from evomerge.merging.routing import routed_model
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from evomerge.merging.weight_map import WeightMap
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import mergekit_yaml
from scripts.benchmarks import machine
from scripts.benchmarks import merge as bench_merge
from scripts.benchmarks import search as bench_search

REPO = Path(__file__).resolve().parents[2]
ROUTE = [(i * 7) % 48 for i in range(65)]
SEARCHES = (
    ("cuda", "one", "one worker"),
    ("cuda", "workers", "two workers on it"),
    ("cpu", "one", "one thread of the CPU"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", choices=("merge", "routes", "search"), default=("merge", "routes", "search")
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--items", type=int, nargs="*", default=[50, 200])
    parser.add_argument("--methods", nargs="*", default=list(bench_merge.METHODS))
    parser.add_argument("--out", type=Path, default=REPO / "results" / "bench_gpu.md")
    args = parser.parse_args()
    lines = [
        "# On a GPU", "",
        f"`python scripts/benchmarks/gpu.py`, {card(args.device)}, "
        f"{machine.stamp('torch', 'transformers', 'lm_eval')}.",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        models = (
            bench_merge.make(Path(scratch), args.layers, args.device)
            if {"merge", "routes"} & set(args.only)
            else []
        )
        parts: dict[str, Callable[[], Iterator[str]]] = {
            "merge": lambda: merges(Path(scratch), models, args),
            "routes": lambda: routes(models, args),
            "search": lambda: searches(Path(scratch), args),
        }
        for name in args.only:
            for line in parts[name]():
                lines.append(line)
                print(line, flush=True)
            args.out.write_text("\n".join(lines) + "\n")


def card(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "no GPU"


def clock(device: str, run: Callable[[], object]) -> float:
    """Seconds, with what is queued on the device done before and after."""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def merges(scratch: Path, models: list[Path], args: argparse.Namespace) -> Iterator[str]:
    files = {str(path): Checkpoint(path) for path in models}
    nbytes = total_bytes(next(iter(files.values())))
    yield from (
        "", "## Merging in place", "",
        f"A base and three perturbations of it, {nbytes / 2e6:.0f} M parameters, bf16; median of "
        f"{args.repeats}. GB/s counts parents read and output "
        "written; copy is a copy of 1 GB on the device. First: the first candidate of a search, which reads "
        "the parents and builds the tables.", "",
        "| method | parents | copy GB/s | first s | merge ms | GB/s | of copy | memory beside models MB "
        "|", "| --- " * 8 + "|",
    )  # fmt: skip
    places = ("device", "pinned") if args.device != "cpu" else ("device",)
    copy = bench_merge.copy_bandwidth(args.device)
    for place in places:
        parents: Any = {name: place_parent(parent, place, args.device) for name, parent in files.items()}
        skeleton = bench_merge.skeleton(models[0]).to(args.device)
        resident = WeightMap(skeleton, files[str(models[0])].tensors)
        known = MagnitudeTables(build=True, ranks_bytes=8 << 30)
        for method in args.methods if place == "device" else ("task_arithmetic", "ties"):
            file = bench_merge.recipe(method, models, scratch)
            recipe = mergekit_yaml.load(
                _yaml.read(file),
                lambda name: files[name].layout.num_layers,
                lambda name: stored_dtype(files[name]),
            )

            def run(
                recipe: Any = recipe, parents: Any = parents, resident: Any = resident, known: Any = known
            ) -> None:
                merge.merge_into(recipe, parents, resident, known, args.device)

            first = clock(args.device, run)
            before = torch.cuda.memory_allocated() if args.device != "cpu" else 0
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(clock(args.device, run) for _ in range(args.repeats))
            peak = torch.cuda.max_memory_allocated() - before if args.device != "cpu" else 0
            rate = nbytes * (len(recipe.models) + 1) / seconds
            cells = [
                method,
                place,
                f"{copy / 1e9:.0f}",
                f"{first:.2f}",
                f"{1000 * seconds:.1f}",
                f"{rate / 1e9:.0f}",
                f"{rate / copy:.0%}",
            ]
            yield "| " + " | ".join([*cells, f"{peak / 1e6:.0f}"]) + " |"
        del parents, skeleton, resident, known, run


def routes(models: list[Path], args: argparse.Namespace) -> Iterator[str]:
    one, other = (bench_merge.skeleton(path).to(args.device).eval() for path in models[:2])
    yield from ("", "## A route of 65 hops over two of them", "", "| | |", "| --- | --- |")
    for what, scales in (("unscaled", [1.0] * 65), ("scaled", [1.0, *(0.9 + 0.005 * i for i in range(64))])):
        gains = routed_model.gains(scales, 65)
        hops = [
            Hop((one, other)[at % 2], at // 2 % args.layers, gain)
            for at, gain in zip(ROUTE, gains, strict=True)
        ]
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if args.device != "cpu" else 0
        made: list[RoutedModel] = []
        first = clock(args.device, lambda made=made: made.append(RoutedModel(one, [one, other])))
        first += clock(args.device, lambda made=made, hops=hops: made[0].install(hops))
        again = statistics.median(
            clock(args.device, lambda made=made, hops=hops: made[0].install(hops))
            for _ in range(args.repeats)
        )
        held_bytes = torch.cuda.memory_allocated() - before if args.device != "cpu" else 0
        weights = sum(p.numel() * p.element_size() for model in (one, other) for p in model.parameters())
        yield f"| {what}: first build, ms | {1000 * first:.0f} |"
        yield f"| {what}: installed again, ms | {1000 * again:.1f} |"
        yield f"| {what}: device memory added, of the parents' | {held_bytes / weights:.3%} |"


def searches(scratch: Path, args: argparse.Namespace) -> Iterator[str]:
    yield from (
        "", "## Searches on the zoo", "",
        "1.3 M parameters, dare_ties, 4 tasks, population 24; candidates a minute once running, one search "
        "each.", "",
        "| items × 4 "
        "| " + " | ".join(f"{'GPU' if device == 'cuda' else 'same machine'}, "
                          f"{what}" for device, _, what in SEARCHES) + " |",
        "| --- " * (len(SEARCHES) + 1) + "|",
    )  # fmt: skip
    quick = argparse.Namespace(quick=False)
    for items in args.items:
        cells = []
        for device, mode, _ in SEARCHES:
            os.environ["EVOMERGE_DEVICE"] = device if args.device != "cpu" else "cpu"
            folder = scratch / device / mode
            folder.mkdir(parents=True, exist_ok=True)
            found = bench_search.run(folder, items, mode, 0, quick)
            print(
                json.dumps(
                    {"items": items, "device": device, "mode": mode}
                    | {k: v for k, v in found.items() if k != "parts"}
                ),
                flush=True,
            )
            cells.append(f"{found['steady']:.0f}")
        yield f"| {items} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
