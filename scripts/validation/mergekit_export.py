"""Exports a study's best with weights and checks it against mergekit and lm-eval's command line; writes
results/export.md.

usage: python scripts/validation/mergekit_export.py [STUDY] [--root results]   (needs
    scripts/make_mergekit_env)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Unequal elements and the largest difference in units in the last place, over all tensors."""
    a, b = load_file(ours / "model.safetensors"), {}
    for file in theirs.glob("*.safetensors"):
        b.update(load_file(file))
    if a.keys() != b.keys():
        sys.exit(f"tensor names differ: {sorted(a.keys() ^ b.keys())[:5]}")
    unequal = largest = total = 0
    for name, x in a.items():
        bits = torch.int16 if x.element_size() == 2 else torch.int32
        p, q = (t.view(bits).to(torch.int64) for t in (x, b[name]))
        low = -(1 << (8 * x.element_size() - 1))
        ordered = [
            torch.where(t < 0, low - t, t) for t in (p, q)
        ]  # two's complement order = order of the numbers
        steps = (ordered[0] - ordered[1]).abs()
        unequal += int((steps != 0).sum())
        largest = max(largest, int(steps.max()))
        total += x.numel()
    return {"tensors": len(a), "elements": total, "unequal": unequal, "largest_ulp": largest}


def lm_eval_scores(model: Path, tasks: Iterable[str], out: Path) -> dict[str, dict[str, float]]:
    """Task -> the metrics that lm_eval's command line gives a checkpoint; out: a folder for its results."""
    run(
        "lm_eval",
        "run",
        *("--model", "hf"),
        *("--model_args", f"pretrained={model},dtype=bfloat16"),
        *("--batch_size", "256"),
        *("--device", "cpu"),
        *("--tasks", ",".join(tasks)),
        *("--include_path", "evaluators"),
        *("--output_path", str(out)),
    )
    return json.loads(next(out.rglob("results*.json")).read_text())["results"]


def stored_scores(candidate: str, root: str) -> dict[str, float]:
    """Task -> the candidate's stored test score, by the task's own metric."""
    shown = json.loads(run("evomerge", "show", candidate, "--json", "--root", root))
    metrics = next(score["metrics"] for score in shown["scores"] if score["role"] == "test")
    return {task: value for task, value in metrics.items() if ":" not in task}


def report(study: str, tensors: dict[str, Any], differences: dict[str, tuple[float, float]]) -> list[str]:
    """The lines of results/export.md; differences: task -> (stored score, lm_eval's)."""
    lines = [
        f"# Export of {study}/best, checked",
        "",
        f"Written by `python scripts/validation/mergekit_export.py {study}`.",
        "",
        "mergekit 0.1.5 on the exported recipe.yaml against the exported checkpoint: "
        f"{tensors['tensors']} tensors, {tensors['elements']} elements, {tensors['unequal']} unequal, "
        f"largest difference {tensors['largest_ulp']} units in the last place.",
        "",
        "| task | stored test score | lm_eval on the checkpoint | difference |",
        "| --- | --- | --- | --- |",
    ]
    for task, (stored, theirs) in differences.items():
        lines.append(f"| {task} | {stored:.6f} | {theirs:.6f} | {abs(stored - theirs):.1e} |")
    return lines


def main() -> None:
    """Exports, checks and writes the report; exits with 1 where the export does not agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", default="demo")
    parser.add_argument("--root", default="results")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "export.md")
    args = parser.parse_args()
    environment = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV", REPOSITORY / ".venv-mergekit"))
    candidate = f"{args.study}/best"
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs, results = Path(scratch, "ours"), Path(scratch, "theirs"), Path(scratch, "lm_eval")
        run("evomerge", "export", candidate, str(ours), "--weights", "--root", args.root)
        run(str(environment / "bin" / "mergekit-yaml"), str(ours / "recipe.yaml"), str(theirs))
        tensors = compare(ours, theirs)
        stored = stored_scores(candidate, args.root)
        metrics = lm_eval_scores(ours, stored, results)
    differences = {}
    for task, value in stored.items():
        accuracy = next(v for k, v in metrics[task].items() if k.split(",")[0] in ("exact_match", "acc"))
        differences[task] = value, accuracy
    lines = report(args.study, tensors, differences)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    worst = max(abs(a - b) for a, b in differences.values())
    if worst > 1e-6 or tensors["largest_ulp"] > 1:
        sys.exit("the export does not agree")


if __name__ == "__main__":
    main()
