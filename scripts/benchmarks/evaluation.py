"""Times the scoring of one candidate three ways and writes results/bench_eval.md.

(a) lm_eval.simple_evaluate with a model's folder, as mergekit-evolve calls it; (b) lm-eval's HFLM at batch
size 32 on the resident model, with requests built and log-likelihood requests tokenised beforehand; (c) ours:
compiled once, replayed for every candidate. The ways take turns; every repeat scores a candidate that none
has scored before, and what they answer is compared.

usage: python scripts/benchmarks/evaluation.py [--only zoo|likelihood|generation …] [--device cuda] [--repeats
    3] [--quick] [--out FILE]
On another device than the CPU there are no goals, and forwards are timed by the clock, with what was queued
done.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.evaluation.inference.generation_probe import regrets
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.evaluation.lm_harness.backends.compiled import CompiledBackend
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from scripts.benchmarks import machine

REPO = Path(__file__).resolve().parents[2]
TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
EXPERTS = ("math", "lang", "string")
INCUMBENT_BATCH, HFLM_BATCH = 64, 32
# deviation of the random weights but the head's; from 0.02, every text soon runs in the same circle of words
WIDE = 0.05
SPECIAL = 4  # tokens of the random model that are no words
HELD = {True: "held", False: "**not held**"}
SHARE = 0.8  # of (c) that forwards should be on the larger model
STEPS = 4  # of bfloat16 by which two right sums may differ: of eight rounded terms each
# logits that rounding to bfloat16 may cost a generated token, see
# evomerge.evaluation.inference.generation_probe
REGRET = 0.06


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds by the clock, and of processor time with that of child processes."""

    wall: float
    processor: float


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    took: way -> a Took a repeat; shares: of forwards in (c); once: seconds spent before the first replay;
    goal: ratio that is asked for, over the way `against`; wrong: how the ways' answers differ by more than
    they may, or ''.
    """

    workload: str
    took: dict[str, list[Took]]
    shares: list[float]
    once: float
    against: str
    goal: float | None
    share_goal: float | None
    note: str
    wrong: str = ""

    def ratio(self, way: str, clock: str) -> float:
        """Median over repeats of that way's time over (c)'s."""
        pairs = zip(self.took[way], self.took["c"], strict=True)
        return statistics.median(getattr(one, clock) / getattr(ours, clock) for one, ours in pairs)


class Resident:
    """A live model and its tokenizer.

    forwards: seconds inside the model's forward so far, by hooks around it: of the processor, or by the clock
    where the model is on another device.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.forwards, self._started = model, tokenizer, 0.0, 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._end)

    def _start(self, *_: object) -> None:
        self._started = self._clock()

    def _end(self, *_: object) -> None:
        self.forwards += self._clock() - self._started

    def _clock(self) -> float:
        if self.model.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class CachedHflm:
    """HFLM on a resident model with prepared requests: token pairs for log-likelihoods, instances for
    generation.
    """

    def __init__(self, resident: Resident, requests: Sequence[Instance]) -> None:
        self.lm = HFLM(pretrained=resident.model, tokenizer=resident.tokenizer, batch_size=HFLM_BATCH)
        self.scored = [r for r in requests if r.request_type == "loglikelihood"]
        self.generated = [r for r in requests if r.request_type == "generate_until"]
        self.requests = [*self.scored, *self.generated]
        found: list[Any] = []
        self.lm._loglikelihood_tokens = lambda pairs, **_: found.extend(pairs) or [(0.0, False)] * len(pairs)
        if self.scored:
            self.lm.loglikelihood(self.scored, disable_tqdm=True)
        del self.lm._loglikelihood_tokens  # the class's own again
        self.pairs = found

    def answer(self) -> list[Any]:
        """(log-likelihood, greedy) pairs, then texts."""
        answers: list[Any] = (
            self.lm._loglikelihood_tokens(self.pairs, disable_tqdm=True) if self.pairs else []
        )
        return answers + (self.lm.generate_until(self.generated, disable_tqdm=True) if self.generated else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("zoo", "likelihood", "generation"),
        default=("zoo", "likelihood", "generation"),
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; its figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=REPO / "results" / "bench_eval.md")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(REPO)  # the shipped tasks name their data from here
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    rows: list[Row] = []
    parameters = 0
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        if "zoo" in args.only:
            rows += zoo(args, Path(scratch))
        if {"likelihood", "generation"} & set(args.only):
            model, tokenizer = random_model(args.quick)
            resident = Resident(model.to(args.device), tokenizer)
            rows += larger(args, resident)
            parameters = sum(p.numel() for p in resident.model.parameters())
    args.out.write_text(report(rows, parameters, args, time.perf_counter() - started))
    print(args.out.read_text())
    if wrong := [f"{row.workload}: {row.wrong}" for row in rows if row.wrong]:
        raise SystemExit("the ways do not answer alike; " + "; ".join(wrong))


def timed(run: Callable[[], Any]) -> tuple[Took, Any]:
    wall, own, before = time.perf_counter(), time.process_time(), os.times()
    found = run()
    wall, own, after = time.perf_counter() - wall, time.process_time() - own, os.times()
    return Took(wall, own + sum(after[2:4]) - sum(before[2:4])), found


def race(
    ways: dict[str, Callable[[], Any]],
    repeats: range,
    resident: Resident,
    renew: Callable[[int], None],
    compare: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, list[Took]], list[float]]:
    """(way -> a Took a repeat, share of forwards in (c) a repeat). A repeat 0 warms up and is not counted."""
    took: dict[str, list[Took]] = defaultdict(list)
    shares = []
    for repeat in repeats:
        renew(repeat)
        found = {}
        for name, run in ways.items():
            resident.forwards = 0.0
            cost, found[name] = timed(run)
            if repeat:
                took[name].append(cost)
                print(f"  {name}: {cost.wall:.3f} s, processor {cost.processor:.3f} s", flush=True)
                if name == "c":
                    shares.append(
                        resident.forwards
                        / (cost.processor if resident.model.device.type == "cpu" else cost.wall)
                    )
        compare(found)
    return dict(took), shares


# ---- the zoo: whole tasks ----------------------------------------------------------------------------------


def zoo(args: argparse.Namespace, scratch: Path) -> list[Row]:
    folders = merges(scratch, args.repeats + 1)
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
        .eval()
        .requires_grad_(False)
    )
    resident = Resident(model.to(args.device), transformers.AutoTokenizer.from_pretrained(folders[0]))
    manager = TaskManager(include_path=str(REPO / "evaluators"), include_defaults=False)
    sizes = ((3, 10.0), (6, 6.0)) if args.quick else ((50, 10.0), (200, None), (500, 6.0))
    return [zoo_row(items, goal, args, folders, resident, manager) for items, goal in sizes]


def zoo_row(
    items: int,
    goal: float | None,
    args: argparse.Namespace,
    folders: list[Path],
    resident: Resident,
    manager: Any,
) -> Row:
    model = resident.model
    chosen = {"test": range(items), "search": [0], "validation": [0]}
    harness = LmHarness([TaskSpec(t, splits="declared", items=chosen) for t in TASKS], resident.tokenizer)
    wanted = harness.items("test")
    once, _ = timed(lambda: harness.score(model, wanted))
    tasks = manager.load(list(TASKS))["tasks"]
    for task in tasks.values():
        task.build_all_requests(limit=items, rank=0, world_size=1)
    cached = CachedHflm(resident, [r for task in tasks.values() for r in task.instances])
    current, differ = folders[:1], [0]

    def renew(repeat: int) -> None:
        current[0] = folders[repeat]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(current[0], dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())

    def ours() -> dict[str, float]:
        _, metrics = harness.score(model, wanted)
        return {t: metrics[t] for t in TASKS}

    def compare(found: dict[str, dict[str, float]]) -> None:
        differ[0] += sum(not found["a"][t] == found["c"][t] == found["b"][t] for t in TASKS)

    took, shares = race(
        {
            "a": lambda: simple(current[0], items, args.device, manager),
            "b": lambda: judged(cached, tasks),
            "c": ours,
        },
        range(args.repeats + 1),
        resident,
        renew,
        compare,
    )
    note = f"of {4 * (args.repeats + 1)} metrics {differ[0]} differ"
    return Row(
        f"zoo, {items} items × 4 tasks",
        took,
        shares,
        once.wall,
        "a",
        goal,
        None,
        note,
        note if differ[0] else "",
    )


def simple(folder: Path, items: int, device: str, manager: Any) -> dict[str, float]:
    """Task -> metric of a model's folder by lm_eval.simple_evaluate, on the first items of each."""
    results: Any = lm_eval.simple_evaluate(
        "huggingface",
        {"pretrained": str(folder), "dtype": "bfloat16", "use_cache": True},
        tasks=list(TASKS),
        limit=items,
        batch_size=INCUMBENT_BATCH,
        device=device,
        log_samples=False,
        verbosity="WARNING",
        task_manager=manager,
    )
    return {
        t: next(v for k, v in results["results"][t].items() if k.startswith(("acc,", "exact_match,")))
        for t in TASKS
    }


def judged(cached: CachedHflm, tasks: dict[str, Any]) -> dict[str, float]:
    """Answers by the cached requests, and each task's first metric by its own filters and judgement."""
    for request, answer in zip(cached.requests, cached.answer(), strict=True):
        request.resps, request.filtered_resps = [answer], {}
    metrics = {}
    for name, task in tasks.items():
        task.apply_filters()
        metric, aggregate = next(iter(task.aggregation().items()))
        key = task._filters[0].name
        values = []
        for _, own in itertools.groupby(task.instances, key=lambda r: r.doc_id):
            requests = list(own)
            values.append(
                task.process_results(requests[0].doc, [r.filtered_resps[key] for r in requests])[metric]
            )
        metrics[name] = float(aggregate(values))
    return metrics


def merges(scratch: Path, count: int) -> list[Path]:
    """Folders of merges that a search could meet: the base plus each expert's change times a random weight in
    [0.2, 1.2].
    """
    from safetensors.torch import load_file, save_file

    base, *experts = (
        load_file(REPO / "results" / "zoo" / name / "model.safetensors") for name in ("base", *EXPERTS)
    )
    rnd, folders = random.Random(0), []
    for number in range(count):
        weights = [rnd.uniform(0.2, 1.2) for _ in experts]
        merged = {}
        for key, tensor in base.items():
            start = tensor.float()
            merged[key] = (
                start + sum(w * (e[key].float() - start) for w, e in zip(weights, experts, strict=True))
            ).to(tensor.dtype)
        folder = scratch / f"merge{number}"
        shutil.copytree(REPO / "results" / "zoo" / "base", folder)
        save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


# ---- a model of ~100 M parameters: requests ----------------------------------------------------------------


def larger(args: argparse.Namespace, resident: Resident) -> list[Row]:
    size = 1 if args.quick else 16
    tokenizer, rnd = resident.tokenizer, random.Random(1)

    def words(count: int) -> str:
        return " ".join(
            tokenizer.convert_ids_to_tokens([rnd.randrange(SPECIAL, len(tokenizer)) for _ in range(count)])
        )

    def choices(items: int, shared: int, own: tuple[int, int]) -> list[Instance]:
        prefix = words(shared)
        found = []
        for item in range(items):
            context = f"{prefix} {words(rnd.randint(*own))}".strip()
            for choice in range(4):
                found.append(
                    Instance(
                        "loglikelihood",
                        {},
                        (context, f" {words(rnd.randint(6, 10))}"),
                        choice,
                        ("bench", item, 1),
                    )
                )
        return found

    def prompts(count: int, shared: int) -> list[Instance]:
        prefix, settings = words(shared), {"until": ["."], "max_gen_toks": 64, "do_sample": False}
        texts = [f"{prefix} {words(rnd.randint(20, 130))}".strip() for _ in range(count)]
        return [
            Instance("generate_until", {}, (text, dict(settings)), 0, ("bench", number, 1))
            for number, text in enumerate(texts)
        ]

    rows = []
    if "likelihood" in args.only:
        few = f"5-shot: 600 shared tokens, 50–70 own, 4 choices of 6–10, {size} items"
        rows.append(likelihood_row(few, choices(size, 600, (50, 70)), 12.0, args, resident))
        none = f"0-shot: context of 90–110, 4 choices of 6–10, {size} items"
        rows.append(likelihood_row(none, choices(size, 0, (90, 110)), 3.5, args, resident))
    if "generation" in args.only:
        mixed = f"generation: {4 * size} prompts of 20–130 tokens, at most 64 new"
        rows.append(generation_row(mixed, prompts(4 * size, 0), 1.5, args, resident))
        prefixed = f"generation: 600 shared tokens, {2 * size} prompts, at most 64 new"
        rows.append(generation_row(prefixed, prompts(2 * size, 600), 3.0, args, resident))
    return rows


def random_model(quick: bool) -> tuple[Any, Any]:
    """A Qwen3 with random weights, and a tokenizer of one word a token, of which one in sixteen ends with a
    full stop.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = 512 if quick else 32_000
    names = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *(f"w{i}{'.' if i % 16 == 5 else ''}" for i in range(SPECIAL, vocabulary)),
    ]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **special
    )
    heads, layers = (2, 2) if quick else (10, 16)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64 * heads,
        intermediate_size=176 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=WIDE,
    )
    torch.manual_seed(0)
    model = (
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        .eval()
        .requires_grad_(False)
    )
    head = model.get_output_embeddings().weight
    head.mul_(0.02 / WIDE)
    head[:SPECIAL] = 0  # never the likeliest: texts end at a full stop or at the limit
    return model, tokenizer


def renew_head(model: Any, repeat: int) -> None:
    """Makes another candidate of a random model: the rows of its head, but for the special tokens', move on
    by one.
    """
    words = model.get_output_embeddings().weight[SPECIAL:]
    words.copy_(words.roll(1, 0))


def likelihood_row(
    name: str, requests: list[Instance], goal: float, args: argparse.Namespace, resident: Resident
) -> Row:
    backend, cached = (
        CompiledBackend(resident.model, resident.tokenizer, HFLM_BATCH),
        CachedHflm(resident, requests),
    )
    once, prepared = timed(lambda: backend.prepare(requests))
    counts, worst = {"pairs": 0, "items": 0, "greedy": 0, "choices": 0}, [0.0]

    def compare(found: dict[str, Any]) -> None:
        theirs, ours = found["b"], [answers[0] for answers in found["c"]]
        for (one, flag), (other, own) in zip(theirs, ours, strict=True):
            step = 2.0 ** (math.floor(math.log2(abs(one))) - 7)  # of bfloat16 at that log-likelihood
            worst[0] = max(worst[0], abs(one - other) / step)
            counts["greedy"] += flag != own
        for at in range(0, len(ours), 4):
            # HFLM's sums are rounded to bfloat16, and tie: another choice counts only if HFLM itself ranks it
            # lower
            chosen = max(range(4), key=lambda k: ours[at + k][0])
            counts["choices"] += theirs[at + chosen][0] < max(s for s, _ in theirs[at : at + 4])
        counts["pairs"] += len(ours)
        counts["items"] += len(ours) // 4

    ways = {"b": cached.answer, "c": lambda: backend.answer(prepared, "model")}
    took, shares = race(
        ways, range(1, args.repeats + 1), resident, partial(renew_head, resident.model), compare
    )
    techniques = [
        t
        for t, verdict in backend.optimizations().items()
        if verdict.allowed and not t.startswith("decoding")
    ]
    backend.close()
    plan = prepared.plan
    assert plan is not None
    note = (
        f"of {counts['pairs']} sums the farthest differ by {worst[0]:.3g} steps of bfloat16, "
        f"{counts['greedy']} greedy flags, "
        f"{counts['choices']} of {counts['items']} choices; "
        f"plan: {plan.optimization}, {plan.tokens} tokens for "
        f"HFLM's {sum(len(c) + len(k) - 1 for _, c, k in cached.pairs)}; "
        f"allowed: {', '.join(techniques)}"
    )
    wrong = f"sums are up to {worst[0]:g} steps of bfloat16 apart" if worst[0] > STEPS else ""
    return Row(name, took, shares, once.wall, "b", goal, SHARE, note, wrong)


def generation_row(
    name: str, requests: list[Instance], goal: float, args: argparse.Namespace, resident: Resident
) -> Row:
    backend, cached = (
        CompiledBackend(resident.model, resident.tokenizer, HFLM_BATCH),
        CachedHflm(resident, requests),
    )
    once, prepared = timed(lambda: backend.prepare(requests))
    lengths: dict[str, list[int]] = defaultdict(list)
    last: dict[str, list[str]] = {}
    differ = 0

    def compare(found: dict[str, Any]) -> None:
        nonlocal differ
        last["b"], last["c"] = found["b"], [answers[0] for answers in found["c"]]
        differ += sum(one != other for one, other in zip(last["b"], last["c"], strict=True))
        for way, texts in last.items():
            lengths[way] += [len(text.split()) for text in texts]

    ways = {"b": cached.answer, "c": lambda: backend.answer(prepared, "model")}
    took, shares = race(
        ways, range(1, args.repeats + 1), resident, partial(renew_head, resident.model), compare
    )
    backend.close()
    unlike = [at for at, (one, other) in enumerate(zip(last["b"], last["c"], strict=True)) if one != other][
        :4
    ]
    regret = dict.fromkeys(last, 0.0)
    with RowHead(resident.model) as head:
        for way, texts in last.items():
            for at in unlike:
                ids, new = (resident.tokenizer.encode(text) for text in (requests[at].args[0], texts[at]))
                if len(new) > 1:  # the last may be a word that lost its full stop
                    regret[way] = max(regret[way], regrets(head, [ids], [new[:-1]])[0])
    mean = {way: statistics.mean(own) for way, own in lengths.items()}
    note = (
        f"{differ} of {len(requests) * args.repeats} texts differ; mean length {mean['b']:.1f} and "
        f"{mean['c']:.1f} tokens"
    )
    if unlike:
        note += (
            f"; regret of {len(unlike)} that differ, scored again in plain rows: HFLM {regret['b']:.3f}, "
            f"ours {regret['c']:.3f} logits"
        )
    plan = prepared.generations[0].plan
    note += (
        f"; decoder {plan.decoder}, {len(plan.prefixes)} shared "
        f"prefix{'es' if len(plan.prefixes) != 1 else ''}"
    )
    wrong = f"a token of ours is {regret['c']:.3f} below the likeliest" if regret["c"] > REGRET else ""
    return Row(name, took, shares, once.wall, "b", goal, SHARE, note, wrong)


# ---- the report --------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], parameters: int, args: argparse.Namespace, seconds: float) -> str:
    """The text of results/bench_eval.md.

    Args:
        rows: of the table.
        parameters: of the larger model, 0 where it was not timed.
        args: of the command line.
        seconds: that all took.
    """
    cpu = args.device == "cpu"
    lines = [
        *_heading(parameters, args, seconds),
        *(_table_row(row, goals=cpu) for row in rows),
        "",
        "A goal is held if both ratios reach it. What was compared:",
        "",
        *(f"- {row.workload}: {row.note}." for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _heading(parameters: int, args: argparse.Namespace, seconds: float) -> list[str]:
    cpu = args.device == "cpu"
    flags = " --quick" * args.quick + f" --device {args.device}" * (not cpu) + f" --repeats {args.repeats}"
    flags += f" --only {' '.join(args.only)}" * (len(args.only) < 3)
    card = "" if cpu else f", {torch.cuda.get_device_name()}"
    larger_model = [
        f"On the larger model (a random Qwen3 of {parameters / 1e6:.0f} M parameters, bfloat16) (b) and (c)",
        "answer the requests, and before every repeat the rows of its head move on by one, which makes "
        "another",
        "model of it.",
    ]
    return [
        "# Scoring one candidate",
        "",
        f"`python scripts/benchmarks/evaluation.py{flags}`, {seconds / 60:.1f} minutes, 1 thread;",
        f"{machine.stamp('torch', 'transformers', 'lm_eval')}{card}.",
        "",
        *(["**A quick run: sizes are tiny and the figures mean nothing.**", ""] if args.quick else []),
        "Seconds are medians of the repeats: by the clock / of the processor, with child processes. A ratio "
        "is",
        "the median over repeats of two times that were taken one after the other.",
        "",
        "- (a) `lm_eval.simple_evaluate` on the folder of a merged model, as mergekit-evolve calls it:",
        f"  bfloat16, batch size {INCUMBENT_BATCH}, its task manager kept.",
        f"- (b) HFLM at batch size {HFLM_BATCH} on the resident model; requests built, log-likelihood "
        "requests",
        "  tokenised beforehand.",
        "- (c) ours: the same requests compiled beforehand and replayed, with lm-eval's rounding.",
        "",
        "On the zoo (1.3 M parameters) all three end with the metrics of the tasks, and every repeat scores",
        "another merge of it.",
        *(larger_model if parameters else []),
        f"Forwards: {'processor time' if cpu else 'time'} between a hook before and a hook after the model's",
        "forward, its head included, as a share of (c).",
        "Once: seconds before any replay, for probing the model and compiling, on the zoo with a first "
        "scoring;",
        "a search compiles once a generation.",
        "",
        "| workload | (a) s | (b) s | (c) s | ratio, clock | ratio, processor | goal | | forwards in (c) "
        "| goal | | once s |",
        "| --- " * 12 + "|",
    ]


def _table_row(row: Row, *, goals: bool) -> str:
    """A line of the table; goals: whether they are shown, which are of the CPU."""
    cells = [row.workload, *(_seconds(row.took.get(way)) for way in "abc")]
    ratios = [row.ratio(row.against, clock) for clock in ("wall", "processor")]
    cells += [f"{ratio:.1f} × ({row.against})" for ratio in ratios]
    if goals and row.goal is not None:
        cells += [f"{row.goal:g} ×", HELD[min(ratios) >= row.goal]]
    else:
        cells += ["", ""]
    share = statistics.median(row.shares)
    cells.append(f"{share:.0%}")
    if goals and row.share_goal is not None:
        cells += [f"{row.share_goal:.0%}", HELD[share >= row.share_goal]]
    else:
        cells += ["", ""]
    return "| " + " | ".join([*cells, f"{row.once:.2f}"]) + " |"


def _seconds(took: Sequence[Took] | None) -> str:
    """Medians by the clock / of the processor, '' of a way that was not timed."""
    if took is None:
        return ""
    return (
        f"{statistics.median(t.wall for t in took):.3f} / {statistics.median(t.processor for t in took):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
