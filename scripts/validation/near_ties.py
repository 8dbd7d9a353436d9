"""Near-ties of a real model in bfloat16: our values of test items beside HFLM's at batch size 1; writes
results/near_ties.md.

usage: python scripts/validation/near_ties.py --model FOLDER --include FOLDER [--rows FILE] [--items 12]
    [TASK ...]

--include: a folder of task folders, each named as its task; --items: test items of each task; --rows: where
what is done is kept, one task a line; run again with the same file, it goes on from there and the table is of
all its rows. In bfloat16 a row's last digits depend on how it was computed, in one piece or after a shared
beginning, and two choices or tokens whose scores round to the same number fall either way. In float32 there
are none.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from scripts.benchmarks import machine
from scripts.validation import row_file

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Row:
    """A task: how many items were scored, in how many the value differs, and the log-probability's bits."""

    task: str
    items: int
    values: int
    bits: int | None
    ours: float
    theirs: float
    seconds: float


def compared(model: Any, tokenizer: Any, task: str, folder: Path, count: int) -> Row:
    """Scores items of a task by our inference and by HFLM at batch size 1."""
    started = time.process_time()
    scores = []
    for backend in ("resident", "lm-eval"):
        spec = TaskSpec(task, splits="hash")
        limits = {"search": 2, "validation": 2, "test": count}
        harness = LmHarness([spec], tokenizer, batch_size=1, include=[folder], limits=limits, backend=backend)
        scores.append(harness.score(model, harness.items("test")))
    (ours, mine), (theirs, hf) = scores
    pairs = list(zip(ours, theirs, strict=True))
    has_bits = all(own.logprob is not None for own, _ in pairs)
    return Row(
        task,
        len(pairs),
        sum(own.value != other.value for own, other in pairs),
        sum(own.logprob != other.logprob for own, other in pairs) if has_bits else None,
        mine[task],
        hf[task],
        time.process_time() - started,
    )


def report(rows: list[Row], model: str, dtype: str) -> list[str]:
    """The lines of results/near_ties.md."""
    items, values = sum(row.items for row in rows), sum(row.values for row in rows)
    lines = [
        "# Near-ties in bfloat16",
        "",
        f"{model} in {dtype}: {values} of {items} test items have another value than HFLM gives them",
        "at batch size 1 (`scripts/validation/near_ties.py`). Other bits: items whose log-probability of the",
        "right answer differs at all.",
        "",
        "| task | items | other values | other bits | ours | HFLM |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        bits = "–" if row.bits is None else str(row.bits)
        lines.append(
            f"| {row.task} | {row.items} | {row.values} | {bits} | {row.ours:.3f} | {row.theirs:.3f} |"
        )
    return [*lines, "", machine.stamp("torch", "transformers", "lm_eval"), ""]


def main() -> None:
    """Parses arguments, compares task after task, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "near_ties.md")
    parser.add_argument("tasks", nargs="*")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    rows = [Row(**row) for row in row_file.read(args.rows)]
    done = {row.task for row in rows}
    for task in args.tasks or sorted(path.parent.name for path in args.include.glob("*/*.yaml")):
        if task in done:
            continue
        row = compared(model, tokenizer, task, args.include / task, args.items)
        print(row, flush=True)
        row_file.append(args.rows, [asdict(row)])
        rows.append(row)
    rows.sort(key=lambda row: row.task)
    args.out.write_text("\n".join(report(rows, args.name, "bfloat16")))


if __name__ == "__main__":
    main()
