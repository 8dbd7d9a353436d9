"""Runs the demo's search with seeds 0, 1 and 2 and writes results/demo.md from the stored rows.

usage: python scripts/validation/demo_seeds.py [--root results] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks import machine

TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
REPOSITORY = Path(__file__).resolve().parents[2]


def search(seed: int, root: str) -> tuple[dict[str, Any], float]:
    """(status of the finished study, seconds of this call)."""
    study = f"demo-seed{seed}" if seed else "demo"  # seed 0 is the one that scripts/demo runs
    started = time.monotonic()
    command = [
        "evomerge",
        "run",
        "search_spaces/demo.yaml",
        "--study",
        study,
        "--seed",
        str(seed),
        "--root",
        root,
        "--resume",
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    seconds = time.monotonic() - started
    status = subprocess.run(
        ["evomerge", "status", study, "--json", "--root", root],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(status.stdout), seconds


def verdict(data: dict[str, Any]) -> list[str]:
    """What the demo has to show, each line with the figure found."""
    best, references = data["best"], data["references"]
    parents = [r for r in references if r["origin"] == "parent"]
    hands = [r for r in references if r["origin"] == "hand"]
    parent = min(parents, key=lambda r: r["lead"])
    hand = min(hands, key=lambda r: r["lead"])
    ratio = min(r["lead"] / r["lead_error"] for r in hands)
    cross, most = best["test_metrics"]["zoo_cross"], max(p["test_metrics"]["zoo_cross"] for p in parents)

    def line(holds: bool, text: str) -> str:
        return f"- {'holds' if holds else '**does not hold**'}: {text}"

    return [
        line(
            parent["lead"] >= 0.20,
            f"above every parent by at least .20: {parent['lead']:+.3f} over {parent['label']}",
        ),
        line(
            hand["lead"] >= 0.05,
            f"above every hand recipe by at least .05: {hand['lead']:+.3f} over {hand['label']}",
        ),
        line(
            ratio > 4, f"by more than four standard errors of the paired difference: {ratio:.1f} at the least"
        ),
        line(
            cross >= 0.50 and most <= 0.20,
            f"cross skill at least .50 where every parent is at most .20: {cross:.3f} against {most:.3f}",
        ),
    ]


def table(data: dict[str, Any]) -> list[str]:
    rows = [
        "| | search | validation | test | lead of the best ± s.e. | " + " | ".join(TASKS) + " |",
        "| --- " * (5 + len(TASKS)) + "|",
    ]
    best = data["best"] | {"label": f"**{data['study']}/{data['best']['id']}** ({data['best']['origin']})"}
    for row in (best, *data["references"]):
        lead = f"{row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
        scores = " | ".join(f"{row[k]:.3f}" for k in ("search", "validation", "test"))
        rows.append(
            f"| {row['label']} | {scores} | {lead} | "
            + " | ".join(f"{row['test_metrics'][t]:.3f}" for t in TASKS)
            + " |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default=str(REPOSITORY / "results" / "demo.md"))
    args = parser.parse_args()
    parts = []
    for seed in args.seeds:
        data, seconds = search(seed, args.root)
        counts = (
            f"{data['evaluations']} candidates in {data['generations']} generations, {data['failed']} "
            "failed evaluations"
        )
        parts += [
            f"## Seed {seed}",
            "",
            f"{counts}; this call took {seconds:.0f} s.",
            "",
            *verdict(data),
            "",
            *table(data),
            "",
        ]
    zoo = json.loads((REPOSITORY / "results" / "zoo" / "zoo.json").read_text())
    head = [
        "# The demo's search, three seeds",
        "",
        "Written by `python scripts/validation/demo_seeds.py` from the stored rows. The best and every "
        "parent and hand recipe are scored on the",
        "same test items, once, after the choice on validation; the lead is the paired difference. Search "
        "scores are on different",
        "items per generation.",
        "",
        f"{machine.stamp('torch', 'transformers', 'lm_eval', 'cma')}; zoo `{zoo['settings_hash']}`.",
        "",
    ]
    Path(args.out).write_text("\n".join(head + parts))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
