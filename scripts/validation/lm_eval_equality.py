"""Our results item by item beside lm-eval's own, over architectures, task configurations and types; writes
results/equality.md.

usage: python scripts/validation/lm_eval_equality.py [--rows FILE] [NAME ...]   (with names of architectures
    or 'zoo': only those, printed, not written)

--rows: where what is done is kept, one model a line; run again with the same file, it goes on from there.

Random models of tests/support/text_architectures.py on the tasks of tests/support/equality_tasks.py, and the
trained models of results/zoo on the shipped tasks and on the same kinds of tasks in their words.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from scripts.benchmarks import machine
from scripts.validation import row_file
from tests.support import equality_oracle as oracle
from tests.support import equality_tasks as tasks
from tests.support import text_architectures
from tests.support.equality_oracle import Differences, Results
from tests.support.equality_tasks import Score

REPOSITORY = Path(__file__).resolve().parents[2]
NAMED = "llama qwen3 gemma2 mistral gpt2 bloom cohere2 qwen3_next mamba2 olmoe granite phi3 mpt lfm2"
DELICATE = "gpt_neo recurrent_gemma jamba mamba rwkv llama4_chunk falcon_alibi gemma3n_text deepseek_v3 xglm"
ARCHITECTURES = tuple(f"{NAMED} {DELICATE}".split())
SHIPPED = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
SHOTS = {
    0: 200
    # examples before an item of the shipped tasks: items of each; with examples take all, lm-eval draws
    # others for a part of the items
}


def penalised(model: Any) -> None:
    """As some instruct models are shipped."""
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.no_repeat_ngram_size = 3


def two_ends(model: Any) -> None:
    """Another EOS than the tokenizer's, beside it."""
    model.generation_config.eos_token_id = [30, text_architectures.EOS]


def other_end(model: Any) -> None:
    """The tokenizer's EOS does not end generation by itself."""
    model.generation_config.eos_token_id = 30


def no_end(model: Any) -> None:
    """Generation ends at stop strings alone."""
    model.generation_config.eos_token_id = None


VARIANTS: dict[str, Callable[[Any], None]] = {
    "llama, repetition_penalty and no_repeat_ngram_size in generation_config": penalised,
    "llama, two EOS in generation_config": two_ends,
    "llama, another EOS in generation_config": other_end,
    "mamba2, no EOS in generation_config": no_end,
}


@dataclass(slots=True)
class Row:
    """A comparison.

    by_task: of each task; noise: HFLM at batch 16 against itself at batch 1, where asked; used: by our
    harness.
    """

    name: str
    how: str
    by_task: dict[str, Differences] = field(default_factory=dict)
    noise: Differences | None = None
    used: str = ""

    @property
    def total(self) -> Differences:
        """Over all tasks."""
        found = Differences()
        for own in self.by_task.values():
            found.add(own)
        return found


def compared(
    name: str, how: str, wanted: Results, found: Results, other: Results | None, *, exact: bool
) -> Row:
    """The row of one model and way of asking."""
    names = list(dict.fromkeys(score.task for score in wanted.metrics))
    row = Row(
        name, how, {task: oracle.compare(wanted.of(task), found.of(task), exact=exact) for task in names}
    )
    if other is not None:
        row.noise = oracle.compare(wanted, other, exact=exact)
    return row


class Sweep:
    """Compares models on one folder of tasks, with harnesses that are loaded once for a tokenizer and way of
    asking.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._harnesses: dict[tuple[str, bool], LmHarness] = {}

    def rows(
        self,
        name: str,
        tokenizer: Any,
        key: str,
        load: Callable[[torch.dtype], Any],
        *,
        groups: bool,
        note: str = "",
    ) -> list[Row]:
        """float32 with and without a chat template, then bfloat16, where HFLM's own difference between
        batches is counted beside.
        """
        found, scores = [], tasks.scores()
        for dtype, chat in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            if chat and not tokenizer.chat_template:
                continue
            single = dtype == torch.float32
            how = f"{'float32' if single else 'bfloat16'}{', chat' if chat else ''}{note}"
            model = load(dtype)
            wanted = oracle.theirs(model, tokenizer, self.folder, scores, chat=chat)
            other = None if single else oracle.theirs(model, tokenizer, self.folder, scores, batch_size=16)
            if (key, chat) not in self._harnesses:
                self._harnesses[key, chat] = oracle.load(tokenizer, self.folder, scores, chat=chat)
            harness = self._harnesses[key, chat]
            row = compared(name, how, wanted, oracle.ours(harness, model, scores), other, exact=single)
            row.used = used(harness, model)
            if groups and single and not chat:
                a = oracle.their_group(model, tokenizer, self.folder, "pair", ("acc", "acc_norm"))
                b = oracle.our_group(model, tokenizer, self.folder, "pair", ("acc", "acc_norm"))
                row.by_task["pair (group)"] = Differences(
                    metrics=2, other_metrics=sum(x != y for x, y in zip(a, b, strict=True))
                )
            found.append(row)
        return found


def used(harness: LmHarness, model: Any) -> str:
    """The technique and the decoder that the verdicts allow."""
    verdicts = harness.optimizations(model, harness.items("test"))
    scoring = next(
        (n for n in ("tree", "fork", "prefix", "plain") if n in verdicts and verdicts[n].allowed), "none"
    )
    decoders = ("slots", "padded", "equal", "single", "whole")
    decoding = next((n for n in decoders if (v := verdicts.get(f"decoding: {n}")) and v.allowed), "none")
    return f"{scoring}, {decoding}"


def random_model(name: str, sweep: Sweep) -> list[Row]:
    """One architecture, or a variant of one; every other one with a tokenizer that begins with BOS."""
    bos = (*ARCHITECTURES, *VARIANTS).index(name) % 2 == 1

    def load(dtype: torch.dtype) -> Any:
        model = text_architectures.build(name.split(",")[0], dtype)
        VARIANTS.get(name, lambda model: None)(model)
        return model

    try:
        return sweep.rows(
            name, text_architectures.tokenizer(bos=bos), f"bos {bos}", load, groups=name in ARCHITECTURES
        )
    except Exception as error:  # shown in the report
        return [Row(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")]


def trained_models(folder: Path) -> list[Row]:
    """The zoo: the shipped tasks, LIMIT items of each, and the tasks of every kind in the zoo's words."""
    zoo = REPOSITORY / "results" / "zoo"
    os.chdir(REPOSITORY)  # the shipped tasks name their data from there
    rows = []
    tokenizer = model_loading.load_tokenizer(Checkpoint(zoo / "base"))
    words = sorted(
        {
            w
            for task in SHIPPED
            for doc in shipped(task)[:300]
            for w in str(doc["prompt"]).split()
            if w.isalnum()
        }
    )
    sweep = Sweep(tasks.write(folder / "zoo_tasks", count=25, vocabulary=words))
    chosen = [
        Score(task, "acc" if task in ("zoo_lookup", "zoo_string") else "exact_match", "none", task)
        for task in SHIPPED
    ]
    harnesses = {
        shots: LmHarness(
            [TaskSpec(task, num_fewshot=shots, splits="declared") for task in SHIPPED],
            tokenizer,
            limits={"test": limit},
        )
        for shots, limit in SHOTS.items()
    }
    for name in ("base", "math", "lang", "string"):

        def load(dtype: torch.dtype, name: str = name) -> Any:
            return model_loading.load_base(Checkpoint(zoo / name), str(dtype).removeprefix("torch."))

        model = load(torch.bfloat16)
        for shots, harness in harnesses.items():
            ids = harness.items("test")
            samples = {
                t: [i for i, doc in enumerate(shipped(t)) if oracle.item_id(doc) in set(ids[t])]
                for t in SHIPPED
            }
            more: dict[str, Any] = {"samples": samples, "num_fewshot": shots}
            of = [
                oracle.theirs(model, tokenizer, REPOSITORY / "evaluators", chosen, batch_size=size, **more)
                for size in (1, 16)
            ]
            how = f"bfloat16, shipped tasks, {SHOTS[shots]} items each, {shots} examples"
            row = compared(f"zoo {name}", how, of[0], oracle.ours(harness, model, chosen), of[1], exact=False)
            row.used = used(harness, model)
            rows.append(row)
        rows += sweep.rows(f"zoo {name}", tokenizer, "zoo", load, groups=False, note=", meaningless words")
    return rows


def shipped(task: str) -> list[dict[str, Any]]:
    """The test documents of a shipped task."""
    return [
        json.loads(line)
        for line in (REPOSITORY / "evaluators" / "zoo" / f"{task}.test.jsonl").read_text().splitlines()
    ]


def say(rows: Sequence[Row]) -> None:
    """A line for each comparison, and what differs."""
    for row in rows:
        total = row.total
        print(
            f"{row.name}, {row.how}: {counted(total)}; {row.used}",
            *(f"    {said}" for said in total.said),
            sep="\n",
        )
        if row.noise is not None:
            print(f"    HFLM at batch 16: {counted(row.noise)}")
    sys.stdout.flush()


def read(file: Path | None) -> dict[str, tuple[list[Row], float]]:
    """Name -> (rows, seconds of processor time) of a file of rows."""
    done = {}
    for line in row_file.read(file):
        rows = [
            Row(
                row["name"],
                row["how"],
                {task: Differences(**differences) for task, differences in row["by_task"].items()},
                Differences(**row["noise"]) if row["noise"] else None,
                row["used"],
            )
            for row in line["rows"]
        ]
        done[line["name"]] = rows, line["seconds"]
    return done


def write(file: Path | None, name: str, rows: Sequence[Row], seconds: float) -> None:
    """Adds a model to a file of rows."""
    plain = [dataclasses.asdict(row) for row in rows]
    row_file.append(file, [{"name": name, "seconds": seconds, "rows": plain}])


def counted(found: Differences) -> str:
    """What differs, of how many."""
    return (
        f"flags {found.other_flags} of {found.requests}, texts {found.other_texts} of {found.texts}, items "
        f"{found.other_items} of {found.items}, "
        f"metrics {found.other_metrics} of {found.metrics}, sums {found.other_sums} (worst {found.worst:.1e})"
    )


def report(rows: Sequence[Row], seconds: float) -> list[str]:
    """The lines of results/equality.md."""
    single = [row for row in rows if row.how.startswith("float32")]
    trained = [row for row in rows if row.how.startswith("bfloat16, shipped")]
    lines = [*_heading(rows, single, trained, seconds), *_float32(single), *_bfloat16(rows)]
    different = [(row, message) for row in [*single, *trained] for message in row.total.said]
    if different:
        lines += ["", "## What differs (float32, and bfloat16 on the shipped tasks)", ""]
        lines += [f"- {row.name}, {row.how}: {message[:300]}" for row, message in different]
    return lines


def _heading(rows: Sequence[Row], single: Sequence[Row], trained: Sequence[Row], seconds: float) -> list[str]:
    meaningless = [row for row in rows if row.how.startswith("bfloat16, meaningless")]
    return [
        "# lm-eval's results and ours, item by item",
        "",
        "Written by `python scripts/validation/lm_eval_equality.py`: the same weights and tasks through",
        "`lm_eval.simple_evaluate` with HFLM at batch size 1 and through our harness; every response, every "
        "item's",
        "value and every metric compared.",
        "",
        f"{machine.stamp('lm_eval', 'torch', 'transformers')}; one thread;",
        f"{seconds / 60:.0f} minutes of processor time.",
        "",
        f"{len({row.name for row in rows})} models, {len(tasks.TASKS)} task configurations and a group, "
        "with and",
        "without chat template (then few-shot examples are turns). Random models: windows of 6 and chunks "
        "of 16",
        "tokens, 256 positions; every other one with a tokenizer that begins with BOS. The zoo: 1.3 M "
        "parameters",
        "each, trained (scripts/zoo/make_zoo.py).",
        f"Sums differ if by more than {oracle.RELATIVE:.0e} of themselves (float32). flags: whether a "
        "continuation",
        "is the likeliest.",
        "",
        f"- **float32**: {counted(total(single))}.",
        f"- **bfloat16, trained models on the shipped tasks**: {counted(total(trained))}.",
        "- bfloat16, trained models on meaningless sequences of their words, where choices and tokens "
        "nearly tie: "
        f"{counted(total(meaningless))}.",
        *(f"- **Could not be compared**: {row.name}: {row.how}" for row in rows if not row.by_task),
    ]


def _float32(rows: Sequence[Row]) -> list[str]:
    """A row for each model and way of asking, then one for each task."""
    lines = [
        "",
        "## float32",
        "",
        "used: technique of scoring and decoder that the probe allowed.",
        "",
        "| model | how | other flags | other texts | other sums | other items | other metrics "
        "| of requests, texts, items, metrics | worst sum | used |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        t = row.total
        counts = f"{t.other_flags} | {t.other_texts} | {t.other_sums} | {t.other_items} | {t.other_metrics}"
        of = f"{t.requests}, {t.texts}, {t.items}, {t.metrics}"
        lines.append(f"| {row.name} | {row.how} | {counts} | {of} | {t.worst:.1e} | {row.used} |")
    lines += [
        "",
        "By task configuration, over all models:",
        "",
        "| task | requests and texts | differences | worst sum |",
        "| --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(task for row in rows for task in row.by_task):
        t = total([Row("", "", {task: row.by_task[task]}) for row in rows if task in row.by_task])
        wrong = t.other_flags + t.other_texts + t.other_sums + t.other_items + t.other_metrics
        lines.append(f"| {task} | {t.requests + t.texts} | {wrong} | {t.worst:.1e} |")
    return lines


def _bfloat16(rows: Sequence[Row]) -> list[str]:
    """Ours beside what HFLM's own batches differ by."""
    lines = [
        "",
        "## bfloat16",
        "",
        "Ours against HFLM at batch size 1, and beside it HFLM at batch size 16 against itself at 1. Random "
        "weights",
        "have near ties everywhere.",
        "",
        "| model | how | flags: ours, HFLM 16 | texts | items | metrics | of requests, texts, items, metrics "
        "| worst sum | used |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        if not row.how.startswith("bfloat16") or row.noise is None:
            continue
        ours, noise = row.total, row.noise
        cells = [
            row.name,
            row.how,
            f"{ours.other_flags} / {noise.other_flags}",
            f"{ours.other_texts} / {noise.other_texts}",
            f"{ours.other_items} / {noise.other_items}",
            f"{ours.other_metrics} / {noise.other_metrics}",
            f"{ours.requests}, {ours.texts}, {ours.items}, {ours.metrics}",
            f"{ours.worst:.1e} / {noise.worst:.1e}",
            row.used,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def total(rows: Sequence[Row]) -> Differences:
    """Over rows."""
    found = Differences()
    for row in rows:
        found.add(row.total)
    return found


def main() -> None:
    """Compares everything, then writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lm_eval", "transformers", "evomerge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    done = read(args.rows)
    rows: list[Row] = []
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(tasks.write(Path(folder) / "tasks"))
        for name in args.names or [*ARCHITECTURES, *VARIANTS, "zoo"]:
            if name not in done:
                began = time.process_time()
                new = trained_models(Path(folder)) if name == "zoo" else random_model(name, sweep)
                done[name] = new, time.process_time() - began
                say(new)
                write(args.rows, name, *done[name])
            rows += done[name][0]
            seconds += done[name][1]
    lines = report(rows, seconds)
    if args.names:
        print("\n".join(lines))
    else:
        (REPOSITORY / "results" / "equality.md").write_text("\n".join(lines) + "\n")
    strict = [row for row in rows if row.how.startswith(("float32", "bfloat16, shipped")) or not row.by_task]
    if any(not row.by_task or not row.total.none for row in strict):
        raise SystemExit("something differs, or a model could not be compared")


if __name__ == "__main__":
    main()
