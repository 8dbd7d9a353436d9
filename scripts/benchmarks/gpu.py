"""What a search does on a GPU, in one call of a few minutes: writes results/bench_gpu.jsonl and .md.

In this order: are the bits of merges the CPU's; merges of 0.5 B and 7 B shapes beside the card's own copy
bandwidth, each method's first candidate apart, which builds the tables; replay of log-likelihood plans;
decoding; whole candidates a minute (200 items of 300 tokens); then the tests marked `gpu`, the most important
first. Models have random weights and are made on the card. All goes the way of a search: ModelBuilder,
MagnitudeTables, Engine, Generator.

Every row is written as it is measured. What is not begun when the time is up is named and left out; a part
that fails has a row with its error, and the others go on.

usage: python scripts/benchmarks/gpu.py [--minutes 5] [--dry] [--tests] [--only PART ...] [--out FILE.jsonl]

--dry runs every part on a CPU with tiny shapes, and graphs over a stand-in: that they run is all it says, its
times mean nothing. --tests runs the tests alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation.inference import cuda_graphs
from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.plan_replay import PlanReplay
from evomerge.evaluation.inference.requests import Request
from scripts.benchmarks import gpu_models, machine
from scripts.benchmarks.gpu_models import METHODS, Models
from scripts.benchmarks.gpu_rows import Rows

REPO = Path(__file__).resolve().parents[2]
_SEARCHES = "tests/integration/test_gpu.py"
TESTS = (  # marked gpu, the most important first
    f"{_SEARCHES}::test_a_live_recipe_is_the_model_that_the_cpu_writes",
    "tests/integration/test_gpu_scoring.py",
    "tests/contracts/test_methods.py::test_a_device_gives_what_the_cpu_gives",
    "tests/methods/test_methods.py::test_a_mask_is_the_same_on_a_device",
    "tests/evaluation/inference/test_request_sums.py::test_a_card_gives_the_sums_of_the_cpu",
    "tests/merging/test_parent_placement.py::test_a_worker_on_a_gpu_merges_what_the_cpu_merges",
    f"{_SEARCHES}::test_a_candidate_that_runs_out_of_memory_is_a_value_and_the_next_is_scored",
    f"{_SEARCHES}::test_scores_in_float32_are_lm_evals",
    f"{_SEARCHES}::test_trained_weights_in_bfloat16_give_lm_evals_scores",
    f"{_SEARCHES}::test_a_route_computes_the_bits_of_a_physical_copy",
    f"{_SEARCHES}::test_a_search_that_is_killed_goes_on_row_by_row",
    f"{_SEARCHES}::test_two_workers_on_one_gpu_give_the_rows_of_one",
    f"{_SEARCHES}::test_a_search_is_near_the_cpus",
)
RESULT = re.compile(r"^(tests/.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)")
DRY_NOTE = (
    "**A dry run on a CPU, with tiny models: no card was there. It shows that every part runs; its times and "
    "rates mean nothing and are left out: a dash stands for each. Bits are those of the CPU beside itself, "
    "graphs those of a stand-in.**"
)


@dataclass
class Run:
    """rows: where results go; dry: on a CPU with tiny shapes; scratch: for headers of models."""

    rows: Rows
    dry: bool
    scratch: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def sizes(self) -> tuple[str, ...]:
        return ("tiny",) if self.dry else ("0.5 B", "7 B")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one run by the clock, with what is queued before and after done."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def again(self, work: Callable[[], object], repeats: int = 7, limit: float = 6.0) -> float:
        """Median seconds of several runs, fewer where they take more than `limit` together."""
        taken: list[float] = []
        while len(taken) < (1 if self.dry else repeats) and (not taken or sum(taken) < limit):
            taken.append(self.seconds(work))
        return median(taken)

    def free(self) -> None:
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry runs every part on a CPU")
    default = REPO / "results" / ("bench_gpu_dry.jsonl" if args.dry else "bench_gpu.jsonl")
    out = (args.out or default).with_suffix(".jsonl")
    stamp = machine.stamp("torch", "transformers")
    title = "On a GPU: dry run, no figures" if args.dry else "On a GPU"
    where = "no card" if args.dry else torch.cuda.get_device_name()
    note = f"`python scripts/benchmarks/gpu.py{' --dry' if args.dry else ''}`, {where}, {stamp}."
    rows = Rows(out, title, f"{DRY_NOTE}\n\n{note}" if args.dry else note, args.minutes, dry=args.dry)
    if args.dry:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(rows, args.dry, Path(scratch))
        if not args.tests:
            measure(run, args.only)
        tests(run)


def measure(run: Run, names: Sequence[str]) -> None:
    """Every part by its name; one that fails is a row."""
    for name in names:
        if run.rows.seconds_left <= 0:
            run.rows.add("left out", name, why="the time is up")
            continue
        try:
            PARTS[name](run)
        except Exception as error:
            traceback.print_exc()
            run.rows.add(
                "failed", name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
        run.free()


# ---- merges ------------------------------------------------------------------------------------------------


def bits(run: Run) -> None:
    """Merges on the card beside the CPU's, all parameters, bit for bit."""
    here = gpu_models.make("odd", run.scratch / "cpu", "cpu")
    there = gpu_models.make("odd", run.scratch / "card", run.device)
    builders = [models.builder(ranks_bytes=1 << 30) for models in (here, there)]
    for method in METHODS:
        wrong = 0
        for seed in (1, 2):
            for builder, models in zip(builders, (here, there), strict=True):
                builder.build(gpu_models.recipe(method, models, seed)).install()
            wrong += sum(_different(a, b.cpu()) for a, b in zip(*map(_weights, (here, there)), strict=True))
        verdict = "all bits are the CPU's" if not wrong else "WRONG"
        run.rows.add("bits", method, elements=2 * here.parameters, different=wrong, verdict=verdict)


def _weights(models: Models) -> list[Tensor]:
    return [tensor for _, tensor in sorted(models.live.state_dict().items())]


def _different(one: Tensor, other: Tensor) -> int:
    return int((one.view(torch.int16) != other.view(torch.int16)).sum())


def merges(run: Run, size: str) -> None:
    """Each method's first candidate and later ones, beside a copy on the card."""
    models = gpu_models.make(size, run.scratch, run.device)
    rate = _copy_rate(run)
    run.rows.add(f"merges, {size}", "copy on the device", GB_s=rate / 1e9)
    for method in ("ties", *(name for name in METHODS if name != "ties")):
        if run.rows.seconds_left <= 0:
            run.rows.add("left out", f"merges, {size}: {method}", why="the time is up")
            continue
        free = 1 << 30 if run.dry else torch.cuda.mem_get_info()[0]
        try:
            _merge(run, models, method, rate, min(6 * models.parameters, free // 4 * 3))
        except Exception as error:
            run.rows.add(f"merges, {size}", method, error=f"{type(error).__name__}: {str(error)[:120]}")
        run.free()


def _merge(run: Run, models: Models, method: str, rate: float, ranks_bytes: int) -> None:
    builder = models.builder(ranks_bytes)  # its tables are empty: the first candidate builds them
    seeds = iter(range(1000))

    def build() -> None:
        builder.build(gpu_models.recipe(method, models, next(seeds))).install()

    first = run.seconds(build)
    limit = max(1.0, min(6.0, run.rows.seconds_left / 8))
    seconds = run.again(build, 9, limit)
    read = 2 if method == "slerp" else 4
    moved = models.nbytes * (read + 1)
    memory = 0 if run.dry else torch.cuda.max_memory_allocated()
    run.rows.add(
        f"merges, {models.size}",
        method,
        first_s=first,
        ms=1000 * seconds,
        GB_s=moved / seconds / 1e9,
        percent_of_copy=100 * moved / seconds / rate,
        peak_GB=memory / 1e9,
    )


def _copy_rate(run: Run) -> float:
    """Bytes read and written a second by a copy on the device."""
    count = 1 << 20 if run.dry else 1 << 32
    one = torch.zeros(count, dtype=torch.uint8, device=run.device)
    other = torch.empty_like(one)
    other.copy_(one)
    return 2 * count / run.again(lambda: other.copy_(one))


# ---- scoring -----------------------------------------------------------------------------------------------


def replay(run: Run, size: str) -> None:
    """A log-likelihood plan from Python and as graphs: the same bits, and what it takes."""
    models = gpu_models.make(size, run.scratch, run.device)
    with _engine(run, models) as engine:
        plan = engine.compile(_requests(run, models, items=200, tokens=300), "plain")
        replaying, engine.replay = engine.replay, None
        eager = engine.run(plan)
        seconds = run.again(lambda: engine.run(plan))
        part, shape = f"replay, {size}", {"forwards": len(plan.steps), "tokens": plan.tokens}
        run.rows.add(part, "from Python", ms=1000 * seconds, **shape)
        engine.replay = replaying
        if replaying is None or not engine._is_short(plan):
            run.rows.add(part, "as graphs", why="not captured: its forwards are long, or there is no card")
            return
        engine.run(plan)
        capture = run.seconds(lambda: engine.run(plan))
        seconds = run.again(lambda: engine.run(plan))
        same = torch.equal(engine.run(plan).sums, eager.sums)
        run.rows.add(
            part,
            "as graphs",
            ms=1000 * seconds,
            capture_s=capture,
            bits="equal" if same else "WRONG",
            refused=replaying.refusal or "no",
        )


def decode(run: Run, size: str) -> None:
    """A step of greedy decoding by each decoder, prefill taken off."""
    models = gpu_models.make(size, run.scratch, run.device)
    rnd = random.Random(0)
    count, length, new = (6, 12, 9) if run.dry else (200, 300, 65)
    vocabulary = models.live.config.vocab_size
    prompts = [[rnd.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
    found: dict[str, list[list[int]]] = {}
    with _engine(run, models) as engine:
        ways = {"slots": ("slots", None), "device, from Python": ("device", None)}
        ways["device, as a graph"] = ("device", engine.replay and engine.replay._graphs)
        for what, (decoder, graphs) in ways.items():
            if run.rows.seconds_left <= 0:
                run.rows.add("left out", f"decode, {size}: {what}", why="the time is up")
                continue
            rules = TextRules(None, 4096, 0)
            limits = GenerationLimits(rows=8 if run.dry else None)
            generator = Generator(
                models.live, engine.head, rules, decoder=decoder, limits=limits, graphs=graphs
            )
            long, short = (generator.compile(prompts, (), n, None) for n in (new, 1))
            found[what] = generator.run(long)
            generator.run(short)
            seconds = run.again(lambda g=generator, p=long: g.run(p), 3)
            prefill = run.again(lambda g=generator, p=short: g.run(p), 3)
            refusal = next((b.refusal for b in generator._batches.values() if b.refusal), "no")
            run.rows.add(
                f"decode, {size}",
                what,
                ms_a_step=1000 * (seconds - prefill) / (new - 1),
                prefill_ms=1000 * prefill,
                prompts=count,
                steps=new - 1,
                refused=refusal,
            )
            run.free()
    if len(found) == 3:
        same = found["device, as a graph"] == found["device, from Python"]
        near = sum(a == b for a, b in zip(found["slots"], found["device, as a graph"], strict=True))
        run.rows.add(f"decode, {size}", "tokens", graph_equals_python=same, texts_equal_to_slots=near)


def candidates(run: Run, size: str) -> None:
    """Whole candidates: merged and scored on 200 items of 300 tokens."""
    models = gpu_models.make(size, run.scratch, run.device)
    with _engine(run, models) as engine:
        plan = engine.compile(_requests(run, models, items=200, tokens=300), "plain")
        for method in ("linear", "ties", "dare_ties"):
            if run.rows.seconds_left <= 0:
                run.rows.add("left out", f"candidates, {size}: {method}", why="the time is up")
                continue
            builder = models.builder()
            merging: list[float] = []

            def candidate(seed: int, method: str = method, builder: Any = builder) -> float:
                recipe = gpu_models.recipe(method, models, seed)
                seconds = run.seconds(lambda: builder.build(recipe).install())
                engine.run(plan).sums.tolist()
                return seconds

            for seed in (0, 1):  # tables, and the plan's graphs
                candidate(seed)
            count, start = 0, time.perf_counter()
            limit = max(2.0, min(15.0, run.rows.seconds_left / 4))
            while count < (2 if run.dry else 500) and (not count or time.perf_counter() - start < limit):
                merging.append(candidate(2 + count))
                count += 1
            seconds = (time.perf_counter() - start) / count
            run.rows.add(
                f"candidates, {size}",
                method,
                a_minute=60 / seconds,
                an_hour=3600 / seconds,
                ms=1000 * seconds,
                merge_ms=1000 * median(merging),
                merge_percent=100 * median(merging) / seconds,
                counted=count,
            )


def _engine(run: Run, models: Models) -> Engine:
    """The engine of a live model; in a dry run with graphs over a stand-in."""
    engine = Engine(models.live)
    if run.dry:
        import pytest

        from tests.support.fake_graphs import FakeGraphs

        FakeGraphs().install(pytest.MonkeyPatch())
        engine.graphs = cuda_graphs.CudaGraphs(torch.device("cpu"))
        engine.replay = PlanReplay(models.live, engine.graphs)
    return engine


def _requests(run: Run, models: Models, items: int, tokens: int) -> list[Request]:
    rnd = random.Random(1)
    items, tokens = (4, 20) if run.dry else (items, tokens)
    vocabulary = models.live.config.vocab_size

    def words(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(3, vocabulary) for _ in range(count))

    return [Request(words(tokens - 4), words(4)) for _ in range(items)]


# ---- tests -------------------------------------------------------------------------------------------------


def tests(run: Run) -> None:
    """The tests marked gpu, in order; each name is printed as it starts. A dry run sees them skipped."""
    if run.rows.seconds_left <= 0:
        run.rows.add("left out", "tests", why="the time is up")
        return
    options = ["-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]
    order = ["-p", "scripts.benchmarks.gpu_test_order"]
    words = [sys.executable, "-m", "pytest", *options, *order, *TESTS]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    seen = 0
    with subprocess.Popen(
        words, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        text, cut = b"", False
        while True:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, run.rows.seconds_left))
            piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                cut = not ready
                process.kill()
                break
            sys.stdout.buffer.write(piece)  # a name as its test begins
            sys.stdout.buffer.flush()
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                if found := RESULT.match(line.decode(errors="replace")):
                    seen += 1
                    run.rows.add("tests", found[1], result=found[2].lower())
    if cut:
        begun = text.decode(errors="replace").split(" ")[0]
        run.rows.add("left out", "tests", why=f"the time is up after {seen}", running=begun)


def _of_sizes(part: Callable[[Run, str], None], index: int) -> Callable[[Run], None]:
    """A part with the first or second size; nothing where a dry run has one."""

    def work(run: Run) -> None:
        if index < len(run.sizes):
            part(run, run.sizes[index])

    return work


PARTS: dict[str, Callable[[Run], None]] = {
    "bits": bits,
    "merges-small": _of_sizes(merges, 0),
    "merges-large": _of_sizes(merges, 1),
    "replay-small": _of_sizes(replay, 0),
    "candidates-large": _of_sizes(candidates, 1),
    "decode-small": _of_sizes(decode, 0),
    "candidates-small": _of_sizes(candidates, 0),
    "decode-large": _of_sizes(decode, 1),
    "replay-large": _of_sizes(replay, 1),
}

if __name__ == "__main__":
    sys.exit(main())
