"""Times whole searches, candidates a minute, beside the incumbent's measured figures; writes
results/bench_search.md.

A search is a process of its own: it reads the YAML, opens the zoo, scores parents and hand recipes, runs
CMA-ES generations, commits every trial, validates finalists and tests the winner. Modes: 'one' search on one
thread, the default for models of this size; 'workers', the same search with its candidates in two processes
(--workers 2).

usage: python scripts/benchmarks/search.py [--items 50 200 500] [--modes one workers] [--repeats 3] [--quick]
    [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks import machine

REPO = Path(__file__).resolve().parents[2]
# mergekit-evolve 0.1.5 on two cores of this class, two workers, 1.3 M-parameter models, dare_ties, 4 tasks:
# items a task -> (candidates a minute by the clock, the same once running); measured for docs of this
# project, not by this script
INCUMBENT = {50: (44, 66), 200: (40, 54), 500: (27, 36)}
GOALS = {50: 15, 200: 10, 500: 6}
GENERATIONS = {50: 8, 200: 5, 500: 4}
FINAL = 40  # items a task of validation and test, whose scoring is not timed
POPULATION = 24
MODES = {"one": "1 worker", "workers": "2 workers"}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SEARCH = """
study: {name}
models: {{base: results/zoo/base, math: results/zoo/math, lang: results/zoo/lang, string: results/zoo/string}}
base: base
method: dare_ties
space:
  groups: 3
  components: [attention, mlp]
  parameters:
    weight: {{low: -0.5, high: 2.5, start: 1.0}}
    density: {{low: 0.3, high: 1.0, start: 0.9}}
tasks: [{{task: zoo_arithmetic}}, {{task: zoo_lookup}}, {{task: zoo_string}}, {{task: zoo_cross}}]
evaluation: {{splits: declared, items: {items}{limits}}}
search: {{evaluations: {evaluations}, population: {population}, sigma: 0.1, seed: {seed}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="*", default=list(GOALS))
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; its figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=REPO / "results" / "bench_search.md")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:  # a search, in a process of its own
        print(json.dumps(search(args.search, args.workers, parts=args.parts)))
        return
    if args.quick:
        args.items, args.repeats = args.items[:1], 1
    started, out = time.perf_counter(), args.out.resolve()
    rates: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for items in args.items:
                for mode in args.modes:
                    found = run(Path(scratch), items, mode, repeat, args)
                    del found["parts"]
                    rates[items, mode].append(found)
                    print(items, mode, {name: round(value, 2) for name, value in found.items()}, flush=True)
        parts = {
            items: run(Path(scratch), items, "one", args.repeats, args, parts=True)["parts"]
            for items in args.items
        }
    out.write_text(report(rates, parts, args, time.perf_counter() - started))
    print(out.read_text())


def run(
    scratch: Path, items: int, mode: str, repeat: int, args: argparse.Namespace, *, parts: bool = False
) -> dict[str, Any]:
    """Runs a search in a process of its own: what it measured."""
    environment = os.environ | ENVIRONMENT | {"EVOMERGE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    population, generations = (4, 2) if args.quick else (POPULATION, GENERATIONS.get(items, 4))
    name = f"{mode}-{items}-{repeat}{'-parts' if parts else ''}"
    file = scratch / f"{name}.yaml"
    count, final = (3, 3) if args.quick else (items, FINAL)
    evaluations, limits = population * generations, f", validation: {final}, test: {final}"
    file.write_text(
        SEARCH.format(
            name=name, items=count, limits=limits, evaluations=evaluations, population=population, seed=repeat
        )
    )
    program = [
        sys.executable,
        __file__,
        "--search",
        str(file),
        "--workers",
        "2" if mode == "workers" else "1",
        *(["--parts"] if parts else []),
    ]
    start = time.perf_counter()
    process = subprocess.run(
        program, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"a search ended with {process.returncode}; its error is above")
    measured = json.loads(process.stdout.splitlines()[-1])
    own = measured["marks"]
    ends = [mark for mark in own if mark["generation"]]
    steady, last = ends[-1]["done"] - ends[0]["done"], ends[-1]
    return {
        "start": own[0]["at"] - start,
        "wall": 60 * last["done"] / (last["at"] - start),
        "steady": 60 * steady / (last["at"] - ends[0]["at"]),
        "candidates": last["done"],
        "selection": measured["ended"] - last["at"],
        "processor": 1e3 * (last["processor"] - ends[0]["processor"]) / steady,
        "failed": measured["failed"],
        "parts": measured["parts"],
    }


# ---- in the process of a search ----------------------------------------------------------------------------


def search(file: Path, workers: int, *, parts: bool) -> dict[str, Any]:
    """Runs a search; clocks are perf_counter's, which all processes of a machine share."""
    from evomerge.config import loading
    from evomerge.launch.prepare import prepare_study
    from evomerge.launch.search_request import SearchRequest

    logging.disable(logging.WARNING)
    settings, text = loading.load(str(file))
    marks: list[dict[str, Any]] = []
    spent: dict[str, float] = defaultdict(float)

    def show(progress: Any) -> None:
        ended = progress.note.startswith("generation ")
        if not marks or ended:
            marks.append(
                {
                    "at": time.perf_counter(),
                    "processor": time.process_time(),
                    "done": progress.done,
                    "generation": ended,
                    "spent": dict(spent),
                }
            )

    if parts:
        measure(spent)
    study = prepare_study(SearchRequest(settings, text), file.parent / "studies", workers=workers, show=show)
    study.run()
    study.pool.close()
    failed = sum(trial.score is None for trial in study.store.trials())
    study.store.close()
    ends = [mark for mark in marks if mark["generation"]]
    first, last = ends[0], ends[-1]
    count = last["done"] - first["done"]
    shares = {
        name: 1e3 * (last["spent"][name] - first["spent"].get(name, 0.0)) / count for name in last["spent"]
    }
    shares["candidate"] = 1e3 * (last["processor"] - first["processor"]) / count
    for mark in marks:
        del mark["spent"]
    return {"marks": marks, "ended": time.perf_counter(), "failed": failed, "parts": shares}


def measure(spent: dict[str, float]) -> None:
    """Adds processor seconds of the parts of a candidate to `spent`, by functions around ours and hooks
    around the model's forward.
    """
    from evomerge.evaluation.lm_harness.harness import LmHarness
    from evomerge.merging import live_model
    from evomerge.store import Store

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*values: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*values, **named)
            finally:
                spent[name] += time.process_time() - start

        return called

    hooked: list[Any] = []
    begun = [0.0]

    def began(*_: object) -> None:
        begun[0] = time.process_time()

    def ended(*_: object) -> None:
        spent["forwards"] += time.process_time() - begun[0]

    score = around("scoring", LmHarness.score)

    def scored(harness: Any, model: Any, items: Any) -> Any:
        if not hooked:
            hooked.extend((model.register_forward_pre_hook(began), model.register_forward_hook(ended)))
        return score(harness, model, items)

    LmHarness.score = scored  # type: ignore[method-assign]
    LmHarness._prepared = around("compiling", LmHarness._prepared)  # type: ignore[method-assign]
    live_model.merge_into = around("merging", live_model.merge_into)  # type: ignore[attr-defined]
    Store.add_trial = around("storing", Store.add_trial)  # type: ignore[method-assign]


# ---- the report --------------------------------------------------------------------------------------------


def report(
    rates: Mapping[tuple[int, str], Sequence[Mapping[str, float]]],
    parts: Mapping[int, Any],
    args: argparse.Namespace,
    seconds: float,
) -> str:
    """The text of results/bench_search.md.

    Args:
        rates: (items a task, mode) -> what each repeat measured.
        parts: items a task -> milliseconds of a candidate by what they went to.
        args: of the command line.
        seconds: that all took.
    """
    lines = _heading(args, seconds)
    lines += [_rate_row(items, mode, own) for (items, mode), own in rates.items()]
    lines += [
        "",
        "Where a candidate's processor time goes, 1 worker and steady: a run apart, by functions around "
        "ours and",
        "hooks around forwards.",
        "",
        "| items × 4 tasks | candidate ms | forwards | scoring beside forwards, compiling | compiling | "
        "merging "
        "| storing | rest |",
        "| --- " * 8 + "|",
    ]
    lines += [_part_row(items, own) for items, own in parts.items()]
    return "\n".join(lines) + "\n"


def _heading(args: argparse.Namespace, seconds: float) -> list[str]:
    flags = (
        f"--items {' '.join(map(str, args.items))} --modes {' '.join(args.modes)} --repeats {args.repeats}"
    )
    quick = " --quick" if args.quick else ""
    return [
        "# Whole searches",
        "",
        f"`python scripts/benchmarks/search.py {flags}{quick}`, {seconds / 60:.1f} minutes;",
        f"{machine.stamp('torch', 'transformers', 'lm_eval', 'cma')}.",
        "",
        *(["**A quick run: sizes are tiny and the figures mean nothing.**", ""] if args.quick else []),
        "CMA-ES over DARE-TIES merges of three 1.3 M-parameter experts, six layers in groups of two, "
        "population",
        f"{POPULATION}, four tasks; candidates a minute, medians of {args.repeats}.",
        "",
        "- Clock: from the start of the process, parents and hand recipes scored on the way, to the end of "
        "the last",
        "  generation.",
        "- Steady: from the end of the first generation to the end of the last. Every trial is committed to "
        "the",
        "  store in both.",
        f"- Selection, the validation of finalists and the test of the winner on {FINAL} items a task each, "
        "comes",
        "  after; the incumbent has none.",
        "- With 1 worker a search is one process on one thread; with 2 (`--workers 2`) two more processes "
        "of one",
        "  thread each evaluate candidates, and the first decides and stores: its own processor time is "
        "what is",
        "  shown.",
        "- The incumbent is mergekit-evolve 0.1.5, patched by hand to run on a CPU, two workers on two "
        "cores of this",
        "  class; models, tasks, items and method of this kind (8 layers in groups of two). Its figures were",
        "  measured earlier, not in this run.",
        "",
        "| items × 4 tasks | mode | candidates | start s | clock | steady | incumbent, clock / steady "
        "| ratio, clock | ratio, steady | goal | | selection s | processor ms a candidate | failed |",
        "| --- " * 14 + "|",
    ]


def _rate_row(items: int, mode: str, repeats: Sequence[Mapping[str, float]]) -> str:
    median = {name: statistics.median(repeat[name] for repeat in repeats) for name in repeats[0]}
    cells = [
        str(items),
        MODES[mode],
        f"{median['candidates']:.0f}",
        f"{median['start']:.1f}",
        f"{median['wall']:.0f}",
        f"{median['steady']:.0f}",
    ]
    if items in INCUMBENT:
        clock, steady = INCUMBENT[items]
        ratio = median["steady"] / steady
        cells += [
            f"{clock} / {steady}",
            f"{median['wall'] / clock:.1f} ×",
            f"{ratio:.1f} ×",
            f"{GOALS[items]} ×",
            "held" if ratio >= GOALS[items] else "**not held**",
        ]
    else:
        cells += [""] * 5
    cells += [
        f"{median['selection']:.1f}",
        f"{median['processor']:.0f}",
        f"{sum(repeat['failed'] for repeat in repeats):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _part_row(items: int, parts: Mapping[str, float]) -> str:
    total = parts["candidate"]
    shares = [
        parts["forwards"],
        parts["scoring"] - parts["forwards"] - parts["compiling"],
        parts["compiling"],
        parts["merging"],
        parts["storing"],
        total - parts["scoring"] - parts["merging"] - parts["storing"],
    ]
    cells = [f"{share:.1f} ({share / total:.0%})" for share in shares]
    return f"| {items} | {total:.1f} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
