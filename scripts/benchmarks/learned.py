"""Measures learned stages beside the demo's evolution: test score against what it cost, in item forwards.

    python scripts/benchmarks/learned.py [--seeds 3] [--steps 10 40] [--workers 2] [--out results/learned.md]

Each row is a whole study over the demo's models and tasks whose only stage is learned, with parents and hand
recipes as in every search; test items are used once, for its winner and the references. A scored item of a
step counts three forward passes, one of a candidate one. The demo's own study, where it is done, gives the
row of evolution.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import machine
import yaml

import evomerge as em
from evomerge.evaluation import FORWARDS_OF_A_SLOPE
from evomerge.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
ITEMS = 30  # of each task in a step


def learned_study(root: Path, seed: int, steps: int, workers: int) -> dict[str, Any]:
    """Runs one study; its row."""
    document = yaml.safe_load((REPOSITORY / "search_spaces" / "demo-evolution.yaml").read_text())
    document["study"] = f"learned-{steps}-{seed}"
    document["search"] = {"seed": seed}
    document["stages"] = [{"stage": "learned", "steps": steps, "items": ITEMS}]
    document["models"] = {name: str(REPOSITORY / path) for name, path in document["models"].items()}
    em.run(document, root=root, workers=workers)
    with Store.open(root / document["study"] / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        trials = [trial for trial in store.trials() if trial.origin == "learned"]
        seconds = sum(sum(trial.seconds.values()) for trial in trials)
        best = study.outcome.best
        genes = len(trials[0].genome or ())
    cost = FORWARDS_OF_A_SLOPE * ITEMS * len(document["tasks"]) * steps
    return {"steps": steps, "seed": seed, "genes": genes, "cost": cost, "seconds": seconds, **best}


def evolution() -> dict[str, Any] | None:
    """The row of the demo's own study, where it is done."""
    file = REPOSITORY / "results" / "demo" / "study.db"
    if not file.is_file():
        return None
    with Store.open(file) as store:
        study = store.study()
        if study is None or study.outcome is None:
            return None
        trials = [t for t in store.trials() if t.generation > 0 and t.origin in ("sampled", "injected")]
        items = yaml.safe_load(study.config)["evaluation"]["items"]
        tasks = len(yaml.safe_load(study.config)["tasks"])
        seconds = sum(sum(trial.seconds.values()) for trial in trials)
        return {
            "genes": len(trials[0].genome or ()),
            "cost": len(trials) * items * tasks,
            "seconds": seconds,
            **study.outcome.best,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for steps in args.steps:
            for seed in range(args.seeds):
                rows.append(learned_study(Path(folder), seed, steps, args.workers))
                print(json.dumps(rows[-1], default=str), flush=True)
    lines = [
        "# Learned weights beside evolution",
        "",
        f"By `scripts/benchmarks/learned.py`; {machine.stamp('torch', 'transformers', 'lm-eval', 'cma')}.",
        "",
        "| search | genes | item forwards | seconds of workers | validation | test (95 % interval) |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    demo = evolution()
    if demo is not None:
        lines.append(_row("CMA-ES, the demo (seed 0)", demo))
    lines += [_row(f"learned, {row['steps']} steps, seed {row['seed']}", row) for row in rows]
    lines.append("")
    for steps in args.steps:
        tests = [row["test"] for row in rows if row["steps"] == steps]
        spread = f", standard deviation {statistics.stdev(tests):.3f}" if len(tests) > 1 else ""
        lines.append(f"- {steps} steps, {len(tests)} seeds: mean test {statistics.fmean(tests):.3f}{spread}")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


def _row(name: str, row: dict[str, Any]) -> str:
    low, high = row["test_interval"]
    return (
        f"| {name} | {row['genes']} | {row['cost']:,} | {row['seconds']:.0f} | {row['validation']:.3f} | "
        f"{row['test']:.3f} ({low:.3f} to {high:.3f}) |"
    )


if __name__ == "__main__":
    main()
