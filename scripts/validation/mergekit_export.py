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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", default="demo")
    parser.add_argument("--root", default="results")
    parser.add_argument("--out", default=str(REPOSITORY / "results" / "export.md"))
    args = parser.parse_args()
    mergekit = (
        Path(os.environ.get("EVOMERGE_MERGEKIT_ENV", REPOSITORY / ".venv-mergekit")) / "bin" / "mergekit-yaml"
    )
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs, results = Path(scratch, "ours"), Path(scratch, "theirs"), Path(scratch, "lm_eval")
        run("evomerge", "export", f"{args.study}/best", str(ours), "--weights", "--root", args.root)
        run(str(mergekit), str(ours / "recipe.yaml"), str(theirs))
        tensors = compare(ours, theirs)
        shown = json.loads(run("evomerge", "show", f"{args.study}/best", "--json", "--root", args.root))
        stored = next(s["metrics"] for s in shown["scores"] if s["role"] == "test")
        model = (
            "--model",
            "hf",
            "--model_args",
            f"pretrained={ours},dtype=bfloat16",
            "--batch_size",
            "256",
            "--device",
            "cpu",
        )
        run(
            "lm_eval",
            "run",
            *model,
            "--tasks",
            ",".join(stored),
            "--include_path",
            "evaluators",
            "--output_path",
            str(results),
        )
        found = json.loads(next(results.rglob("results*.json")).read_text())["results"]
    lines = [
        f"# Export of {args.study}/best, checked",
        "",
        f"Written by `python scripts/validation/mergekit_export.py {args.study}`.",
        "",
        "mergekit 0.1.5 on the exported recipe.yaml against the exported checkpoint: "
        f"{tensors['tensors']} tensors, {tensors['elements']} elements, {tensors['unequal']} unequal, "
        f"largest difference {tensors['largest_ulp']} units in the last place.",
        "",
        "| task | stored test score | lm_eval on the checkpoint | difference |",
        "| --- | --- | --- | --- |",
    ]
    worst = 0.0
    for task, value in stored.items():
        theirs_value = next(v for k, v in found[task].items() if k.split(",")[0] in ("exact_match", "acc"))
        worst = max(worst, abs(value - theirs_value))
        lines.append(f"| {task} | {value:.6f} | {theirs_value:.6f} | {abs(value - theirs_value):.1e} |")
    Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if worst > 1e-6 or tensors["largest_ulp"] > 1:
        sys.exit("the export does not agree")


if __name__ == "__main__":
    main()
