"""Measures relaxed routes on the demo's models: the route, its test score and what it cost, by seed.

    python scripts/benchmarks/relaxed_routes.py [--seeds 5] [--evaluations 24] [--out FILE]

Each row is a whole study whose only stage is `{stage: routes, method: relaxed}` with its defaults. Costs are
item forwards: a scored item of a step counts three, one of a candidate one; parents are counted, hand-written
routes, which every search of routes scores, are not. The relaxed route's test score is made here, beside the
study; the study's own test items are used once, for its winner and the references.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import yaml

import evomerge as em
from evomerge.evaluation import FORWARDS_OF_A_SLOPE
from evomerge.launch.opening import open_stored_search
from evomerge.store import Store, Trial

REPOSITORY = Path(__file__).resolve().parents[2]


def relaxed_study(root: Path, seed: int, evaluations: int) -> dict[str, Any]:
    """Runs one study; its row."""
    document = yaml.safe_load((REPOSITORY / "search_spaces" / "demo-routes.yaml").read_text())
    document["study"] = f"relaxed-{seed}"
    document["search"] = {"seed": seed, "population": min(24, evaluations)}
    document["stages"] = [{"stage": "routes", "method": "relaxed", "evaluations": evaluations}]
    document["models"] = {name: str(REPOSITORY / path) for name, path in document["models"].items()}
    em.run(document, root=root)
    with Store.open(root / document["study"] / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        trials = store.trials()
        steps = [trial for trial in trials if trial.origin == "learned"]
        parents = [trial for trial in trials if trial.origin == "parent"]
        evolved = [trial for trial in trials if trial.origin in ("sampled", "injected")]
        relaxed = next(trial for trial in trials if trial.label == "relaxed route")
        recipe = store.recipe(relaxed.recipe_id)
        opened = open_stored_search(store)
        tested = opened.load().evaluate(recipe, opened.harness.items("test"))
        best = study.outcome.best
        return {
            "seed": seed,
            "outer": recipe.embeddings.sources[0][0],
            "layers": [mix.sources[0][0] for mix in recipe.layers],
            "cost": FORWARDS_OF_A_SLOPE * _items(store, steps) + _items(store, [*parents, relaxed]),
            "seconds": sum(sum(trial.seconds.values()) for trial in steps),
            "test": opened.objective.reported_score(tested),
            "evolved": _items(store, evolved),
            "winner": best["test"],
            "winner_id": best["id"],
            "is_relaxed": best["recipe"] == relaxed.recipe_id,
        }


def _items(store: Store, trials: Sequence[Trial]) -> int:
    """Items that trials were scored on."""
    return sum(len(store.scored(trial).evaluation.items) for trial in trials)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            rows.append(relaxed_study(Path(folder), seed, args.evaluations))
            print(json.dumps(rows[-1], default=str), flush=True)
    lines = [
        "# Relaxed routes",
        "",
        f"By `scripts/benchmarks/relaxed_routes.py`; {machine.stamp('torch', 'transformers', 'lm-eval')}.",
        "",
        "Cost in item forwards up to the relaxed route and its score: the descent, a scored item counted as",
        "three, the four parents and the route itself. Evolution goes on from it.",
        "",
        "| seed | embeddings and head | layers | cost | seconds of the descent | test of the relaxed route | "
        "item forwards of the evolution after it | test of the winner |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_row(row) for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


def _row(row: dict[str, Any]) -> str:
    winner = f"{row['winner']:.4f}" + (" (the relaxed route)" if row["is_relaxed"] else "")
    return (
        f"| {row['seed']} | {row['outer']} | {', '.join(row['layers'])} | {row['cost']:,} | "
        f"{row['seconds']:.1f} | {row['test']:.4f} | {row['evolved']:,} | {winner} |"
    )


if __name__ == "__main__":
    main()
