"""Measures what the derivatives of a loss by a merge's coefficients cost beside scoring: time and memory.

    python scripts/benchmarks/slopes.py [--only time memory] [--shapes 135M .5B] [--repeats 9]
        [--out results/slopes.md]

Time: the processor's seconds of this process on one thread, slope and scoring in turns, the median of their
ratios, and the ratio of the least of both, which others on the machine disturb less. Memory: each figure is
of a child process, whose high-water mark (VmHWM) is set back once the merge is built; it counts the parents'
files that are mapped, and is given without them too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import save_file

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.config import load
from evomerge.evaluation import GradientRequest
from evomerge.evaluation.inference.gradient_memory import Way, choose_way, measure
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import LoglikelihoodPlan
from evomerge.evaluation.inference.requests import Request
from evomerge.evaluation.inference.target_logprobs import target_logprobs
from evomerge.launch.opening import open_search
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.low_rank import LowRankTaskVectors
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.model_loading import load_base
from evomerge.merging.weight_map import WeightMap
from evomerge.methods.fused.one_pass import projections
from evomerge.recipes import Mix, Recipe, params
from evomerge.spaces import WeightSpace

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {  # SmolLM2-135M
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tiny": {  # to try this script
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
    ".5B": {  # Qwen2.5-.5B
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
PREFIX, ITEMS, CHOICES = 1000, 8, 4
MODES = ("inference", "slope", "recomputed", "naive")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=("135M", ".5B"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--items", type=int, default=16, help="of each task of the demo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(peak(args.child[0], Path(args.child[1]))))
        return
    lines = [
        "# What slopes cost",
        "",
        f"By `scripts/benchmarks/slopes.py`; {machine.stamp('torch', 'transformers', 'lm-eval')}; "
        f"load {os.getloadavg()[0]:.1f} when it began.",
    ]
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "time": lambda: times(args.repeats, args.items),
        "memory": lambda: peaks(args.shapes),
    }
    for name in args.only:
        for line in parts[name]():
            lines.append(line)
            print(line, flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


# ---- time --------------------------------------------------------------------------------------------------


def times(repeats: int, count: int) -> Iterator[str]:
    """The table of times, on the demo's models."""
    yield from (
        "", "## Time", "",
        f"The demo's models in bfloat16, one thread; median of {repeats} ratios of the process's seconds. "
        "Forward: the same plan scored without gradients. A slope includes dot products with three parents.",
        "", "| requests | plan | forward ms | slope ms | slope / forward | of the least |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    )  # fmt: skip
    opened = open_search(load(str(REPOSITORY / "search_spaces" / "demo.yaml"))[0])
    worker, space, harness = opened.load(), opened.space, opened.harness
    assert isinstance(space, WeightSpace)
    recipe = space.decode(space.start)
    items = {task: tuple(ids)[:count] for task, ids in harness.items("search").items()}
    request = GradientRequest(dict.fromkeys(items, 1.0 / count))
    worker.module(recipe, items)
    evaluator: Any = worker.evaluator
    with worker.builder.coefficient_slopes(recipe):
        evaluator.backward(worker.model, items, request)
    backend = evaluator._models.get(worker.model).backend
    (texts,) = evaluator._models.get(worker.model).texts.values()
    engine = backend._engine

    def slope(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            with worker.builder.coefficient_slopes(recipe):
                run()

        return whole

    step = f"the demo's {sum(map(len, items.values()))} items"
    whole_step = slope(lambda: evaluator.backward(worker.model, items, request))
    plan = texts.prepared.plan
    yield _time_row(step, plan, engine, whole_step, repeats)

    def merged(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            worker.module(recipe, items)
            run()

        return whole

    forward = merged(lambda: engine.sums(plan))
    yield _time_row(f"{step}, with the merge in both", plan, engine, merged(whole_step), repeats, forward)
    asked = requests(476, prefix=64, items=24, length=10)
    for optimization in ("plain", "prefix", "fork", "tree"):
        plan = engine.compile(asked, optimization)
        run = slope(lambda plan=plan: engine.differentiate(plan, torch.ones_like))
        yield _time_row("24 items of 4 choices after 64 shared tokens", plan, engine, run, repeats)
    yield from _adapter_rows(opened.parents["base"], asked, repeats)
    yield from _shape_rows("135M", max(1, repeats // 3))
    yield from _product_rows(repeats)


def _product_rows(repeats: int) -> Iterator[str]:
    """One linear layer of two adapters: by its gradient, and by activations."""
    yield from (
        "", "One linear layer, 1,024 tokens, two adapters of rank 8: its gradient and two dot products with "
        "it, beside thin products of activations; the least of the repeats.",
        "", "| out × in | gradient ms | activations ms |", "| --- | ---: | ---: |",
    )  # fmt: skip
    for rows, columns in ((128, 128), (576, 576), (1536, 576), (4864, 896)):
        inputs, gradients = (torch.randn(1024, width).bfloat16() for width in (columns, rows))
        base, *sources = (torch.randn(rows, columns).bfloat16() for _ in range(3))
        thin = LowRankTaskVectors(torch.randn(rows, 16), torch.randn(columns, 16), (8, 8))
        least = []
        for _ in range(repeats):
            whole = seconds(partial(_whole_products, inputs, gradients, base, sources))
            least.append((whole, seconds(partial(thin.products, inputs, gradients))))
        cells = [f"{1e3 * min(column):.2f}" for column in zip(*least, strict=True)]
        yield f"| {rows} × {columns} | {' | '.join(cells)} |"


def _shape_rows(shape: str, repeats: int) -> Iterator[str]:
    """Fewer of the same requests on a larger model, where products of matrices take most of the time."""
    with tempfile.TemporaryDirectory() as folder:
        make_models(shape, Path(folder))
        parents = {name: Checkpoint(Path(folder) / name) for name in ("base", "a", "b")}
        model: Any = load_base(parents["base"], "bfloat16")
        weights = WeightMap(model, parents["base"].tensors)
        merge = Merge(_recipe(parents["base"].layout.num_layers), parents)
        asked = requests(model.config.vocab_size, prefix=64, items=8, length=10)
        with Engine(model) as engine:
            for optimization in ("plain", "prefix", "fork", "tree"):
                plan = engine.compile(asked, optimization)

                def slope(plan: LoglikelihoodPlan = plan) -> None:
                    with CoefficientSlopes(merge, weights):
                        engine.differentiate(plan, torch.ones_like)

                name = f"8 items of 4 choices after 64 shared tokens, {shape} shape, two parents"
                yield _time_row(name, plan, engine, slope, repeats)


def _adapter_rows(base: Parent, asked: Sequence[Request], repeats: int) -> Iterator[str]:
    """Two LoRA adapters of every linear layer as parents: by activations, and by gradients of weights."""
    assert isinstance(base, Checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: _adapter(base, Path(folder) / name) for name in ("a", "b")}
        model: Any = load_base(base, "bfloat16")
        weights = WeightMap(model, base.tensors)
        recipe = _recipe(base.layout.num_layers)
        with Engine(model) as engine:
            plan = engine.compile(asked, "plain")
            for name, parents in (
                ("activations", {"base": base, **adapters}),
                ("gradients of weights", {"base": base, **{n: _Other(p) for n, p in adapters.items()}}),
            ):
                merge = Merge(recipe, parents)

                def slope(merge: Merge = merge) -> None:
                    with CoefficientSlopes(merge, weights):
                        engine.differentiate(plan, torch.ones_like)

                yield _time_row(f"the same, two adapters of rank 8, by {name}", plan, engine, slope, repeats)


def _whole_products(
    inputs: torch.Tensor, gradients: torch.Tensor, base: torch.Tensor, sources: Sequence[torch.Tensor]
) -> list[float]:
    """Dot products of task vectors with the gradient of a weight."""
    return projections(gradients.T @ inputs, base, sources)


class _Other:
    """A parent that is not known as an adapter; holds its tensors."""

    def __init__(self, parent: Parent) -> None:
        self._parent, self._tensors = parent, {name: parent.tensor(name) for name in parent.tensors}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parent, name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _adapter(base: Checkpoint, folder: Path) -> AdaptedCheckpoint:
    """A random adapter of rank 8 of every linear layer of the stack."""
    folder.mkdir()
    modules = [name.removesuffix(".weight") for name in base.tensors if "proj" in name]
    tensors = {}
    for module in modules:
        rows, columns = base.tensors[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(8, columns) * 0.02
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 8) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return AdaptedCheckpoint(base, folder)


def _time_row(
    name: str,
    plan: LoglikelihoodPlan,
    engine: Engine,
    slope: Callable[[], None],
    repeats: int,
    forward: Callable[[], object] | None = None,
) -> str:
    """A row; forward: what is the measure, None for the plan's sums."""
    ratios, forwards, slopes = [], [], []
    for number in range(repeats + 1):
        first, second = seconds(forward or (lambda: engine.sums(plan))), seconds(slope)
        if number:  # the first warms up
            forwards.append(first)
            slopes.append(second)
            ratios.append(second / first)
    return (
        f"| {name} | {plan.optimization}, {plan.tokens} tokens in {len(plan.steps)} forwards | "
        f"{1e3 * statistics.median(forwards):.0f} | {1e3 * statistics.median(slopes):.0f} | "
        f"{statistics.median(ratios):.2f} | {min(slopes) / min(forwards):.2f} |"
    )


def seconds(run: Callable[[], object]) -> float:
    """Seconds of the processor that this process takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def requests(vocabulary: int, *, prefix: int, items: int, length: int) -> list[Request]:
    """Items of four choices whose contexts begin alike."""
    rnd = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(3, vocabulary) for _ in range(count))

    shared = tokens(prefix)
    contexts = [shared + tokens(length + rnd.randrange(length)) for _ in range(items)]
    return [Request(context, tokens(1 + i)) for context in contexts for i in range(CHOICES)]


# ---- memory ------------------------------------------------------------------------------------------------


def peaks(shapes: Sequence[str]) -> Iterator[str]:
    """The table of peaks, each in a process of its own."""
    yield from (
        "", "## Memory", "",
        f"Random weights in bfloat16, task arithmetic of two parents; {ITEMS} items of {CHOICES} choices "
        f"after {PREFIX} shared tokens, scored as a tree. Peak: the process's high-water mark, with Python "
        "and its libraries; anonymous: the most of 5 ms' samples without mapped files; ×: of inference. "
        "Slope: as a search takes it; recomputed: with layers that run again; naive: one graph of the whole "
        "plan, every gradient kept, then dot products with stacked task vectors. Distance: of the "
        "derivatives to the naive ones, as a part of their norm.",
        "", "| shape | what | way | peak MB | × | anonymous MB | × | seconds | × | distance |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    )  # fmt: skip
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_models(shape, Path(folder))
            rows = {mode: _child(mode, Path(folder)) for mode in MODES}
        first = rows["inference"]
        for mode, row in rows.items():
            cells = [
                f"{row[key]:.1f} | {row[key] / first[key]:.2f}" for key in ("peak", "anonymous", "seconds")
            ]
            away = _distance(row["partials"], rows["naive"]["partials"]) if row["partials"] else None
            cells.append("" if away is None else f"{away:.1e}")
            yield f"| {shape} | {mode} | {row['way']} | {' | '.join(cells)} |"


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((a - b).norm() / b.norm())


def _child(mode: str, folder: Path) -> dict[str, Any]:
    """What a process of its own measures."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", mode, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_models(shape: str, folder: Path) -> None:
    """A base of a shape and two models near it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = CONFIG_MAPPING[settings.pop("model_type")](max_position_embeddings=2048, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name in ("base", "a", "b"):
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.002)
        model.save_pretrained(folder / name)


def peak(mode: str, folder: Path) -> dict[str, Any]:
    """Peak memory and seconds of one mode, in this process."""
    parents = {name: Checkpoint(folder / name) for name in ("base", "a", "b")}
    model: Any = load_base(parents["base"], "bfloat16")
    weights = WeightMap(model, parents["base"].tensors)
    depth = parents["base"].layout.num_layers
    recipe = _recipe(depth)
    merge_into(recipe, parents, weights)
    asked = requests(model.config.vocab_size, prefix=PREFIX, items=ITEMS, length=16)
    with Engine(model) as engine:
        plan = engine.compile(asked, "tree")
        merge = Merge(recipe, parents)
        with CoefficientSlopes(merge, weights):
            chosen = choose_way(plan, measure(engine.forward))
        way = Way(1, recomputes=True) if mode == "recomputed" else chosen
        anonymous = _Sampler()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        anonymous.start()
        start = time.process_time()
        partials: list[float] = []
        if mode == "inference":
            engine.sums(plan)
        elif mode == "naive":
            partials = naive(engine, plan, merge, weights)
        else:
            with CoefficientSlopes(merge, weights) as slopes:
                engine.differentiate(plan, torch.ones_like, way)
            partials = [value for _, value in sorted(slopes.partials.items())]
        took = time.process_time() - start
        most = anonymous.stop()
    words = {"inference": "no gradient", "naive": "whole graph"}
    said = words.get(mode, f"{way.passes} pass{'es' * (way.passes > 1)}{', recomputed' * way.recomputes}")
    return {
        "way": said, "peak": _status("VmHWM"), "anonymous": most, "seconds": took, "partials": partials,
    }  # fmt: skip


def naive(engine: Engine, plan: LoglikelihoodPlan, merge: Merge, weights: WeightMap) -> list[float]:
    """One graph of the plan, whose gradients are all kept; then dot products with float32 stacks."""
    weights.model.requires_grad_(True)
    caches: dict[int, Any] = {}
    total = torch.zeros((), dtype=torch.float64)
    for step in plan.steps:
        logits = engine.forward_step(step, caches)
        if step.reads is not None:
            total = total + target_logprobs(logits, step.reads, "float32")[0].double().sum()
    total.backward()  # type: ignore[no-untyped-call]
    found = {}
    for step in (step for step in merge.steps if step.mix is not None):
        (parameter,) = [p for p in weights.model.parameters() if step.name in weights.fed_by(p)]
        base, *sources = (merge.parents[name].tensor(step.name).float() for name in ("base", "a", "b"))
        differences = torch.stack([source - base for source in sources])
        assert parameter.grad is not None
        gradient = weights.gradient(step.name, parameter.grad).float()
        for source, difference in zip(("a", "b"), differences, strict=True):
            found[step.name, "weight", source] = float((gradient * difference).sum(dtype=torch.float64))
        by_weights = [found[step.name, "weight", source] for source in ("a", "b")]
        found[step.name, "lambda", ""] = 0.4 * sum(by_weights)
    return [value for _, value in sorted(found.items())]


def _recipe(depth: int) -> Recipe:
    """Task arithmetic of two models with weights .4."""
    given = params({"weight": 0.4})

    def mix(layer: int | None) -> Mix:
        return Mix("task_arithmetic", (("a", layer), ("b", layer)), ("base", layer), given)

    return Recipe("base", tuple(map(mix, range(depth))), mix(None), mix(None), out_dtype="bfloat16")


class _Sampler(threading.Thread):
    """The most anonymous memory of this process, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ends = threading.Event()
        self._most = 0.0

    def run(self) -> None:
        while not self._ends.wait(0.005):
            self._most = max(self._most, _status("RssAnon"))

    def stop(self) -> float:
        """Ends it; MB."""
        self._ends.set()
        self.join()
        return max(self._most, _status("RssAnon"))


def _status(key: str) -> float:
    """A size of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1e3
    raise KeyError(key)


if __name__ == "__main__":
    main()
