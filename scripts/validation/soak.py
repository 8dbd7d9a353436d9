#!/usr/bin/env python
"""The soak: drivers and workers killed, drivers raced, inputs mutated, stores damaged; hundreds and thousands
of times.

Each part goes on where it was broken off, prints what it came to, and ends with 1 if it found something.
`all` runs every part and writes the report. One input alone: scripts/validation/soak.py inputs --case
SEED/KIND/NUMBER
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from scripts.validation.soak_parts import pieces, report

REPOSITORY = Path(__file__).resolve().parents[2]
os.environ.update(pieces.environment())
CONFIGS = {"search": 0.4, "mergekit": 0.4, "recipe": 0.2}  # shares of --configs
SIZES = (
    ("evaluations", 4000, "drivers: budget of the study"),
    ("kills", 500, "drivers: SIGKILLs in all"),
    ("ray", 50, "drivers: how many of them with a Ray pool"),
    ("ray-evaluations", 1000, "drivers: budget of the study with a Ray pool"),
    ("worker-evaluations", 96, "workers: budget of each study"),
    ("machine-evaluations", 96, "machines: budget of the study in each pool"),
    ("races", 200, "races"),
    ("configs", 100_000, "inputs: search files, mergekit files and recipes"),
    ("headers", 100_000, "inputs: safetensors headers"),
    ("damages", 1000, "damage: to stores, each opened in two ways"),
)


def part(name: str, work: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    """(data, lines of the report, what was found wrong)."""
    if name == "drivers":
        from scripts.validation.soak_parts import kills

        data = kills.run(
            work,
            evaluations=args.evaluations,
            kills=args.kills,
            ray=args.ray,
            seed=args.seed,
            ray_evaluations=args.ray_evaluations,
        )
        return data, list(kills.lines(data)), kills.failures(data)
    if name == "workers":
        from scripts.validation.soak_parts import faults

        data = faults.run(work, rates=args.rates, evaluations=args.worker_evaluations, seed=args.seed)
        return data, list(faults.lines(data)), faults.failures(data)
    if name == "machines":
        from scripts.validation.soak_parts import machines

        data = machines.run(
            work, evaluations=args.machine_evaluations, rate=0.3, seed=args.seed, pools=args.pools
        )
        return data, list(machines.lines(data)), machines.failures(data)
    if name == "races":
        from scripts.validation.soak_parts import races

        data = races.run(work, races=args.races, evaluations=10_000, seed=args.seed)
        return data, list(races.lines(data)), [f"race {number}: {said}" for number, said in data["wrong"]]
    if name == "inputs":
        from scripts.validation.soak_parts import inputs

        counts = {kind: int(share * args.configs) for kind, share in CONFIGS.items()} | {
            "header": args.headers
        }
        data = inputs.run(work, counts, args.seed, args.processes)
        return data, list(inputs.lines(data)), [f"{case}: {said}" for case, said in data["found"]]
    from scripts.validation.soak_parts import damage

    data = damage.run(work, damages=args.damages, evaluations=96, seed=args.seed)
    return data, list(damage.lines(data)), [f"{case}: {said}" for case, said in data["found"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*report.TITLES, "all"])
    parser.add_argument(
        "--work",
        type=Path,
        default=REPOSITORY / "results" / "soak",
        help="folder for what each part has done so far",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "soak.md")
    parser.add_argument("--processes", type=int, default=2, help="inputs: at a time (2)")
    parser.add_argument(
        "--rates",
        type=lambda text: [float(r) for r in text.split(",")],
        default=[0, 0.1, 0.3, 0.5],
        help="workers: deaths per attempt",
    )
    parser.add_argument(
        "--pools",
        type=lambda text: text.split(","),
        default=["in-process", "processes", "ray"],
        help="machines: in which pools",
    )
    parser.add_argument("--report", action="store_true", help="one part: write it into the report as well")
    parser.add_argument("--case", help="inputs: one case by its name, shown whole")
    for name, default, what in SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default:,})")
    args = parser.parse_args()
    if args.case:
        from scripts.validation.soak_parts import inputs

        inputs.show(args.case)
        return
    results, wrong = {}, []
    for name in report.TITLES if args.part == "all" else [args.part]:
        started = time.monotonic()
        data, lines, found = part(name, args.work / name, args)
        results[name] = data, [*lines, *([""] if found else []), *(f"- {said}" for said in found[:20])]
        wrong += found
        print("\n".join(lines))
        print(
            f"{name}: {f'{len(found)} found' if found else 'nothing found'}, "
            f"{time.monotonic() - started:.0f} s in this call",
            flush=True,
        )
        for said in found[:20]:
            print(f"  {said}")
    if args.report and args.part != "all":
        report.put(args.out, args.part, *results[args.part])
    if args.part == "all":
        args.out.write_text(
            report.text(results, {name: getattr(args, name.replace("-", "_")) for name, _, _ in SIZES})
        )
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
