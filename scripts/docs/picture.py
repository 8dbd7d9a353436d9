"""Draws the picture of the README from a finished study: validation score against cost, beside references.

python scripts/docs/picture.py results/demo/study.db docs/images/demo.svg
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from evomerge.reports.stages import stage_rows
from evomerge.store import Store, Trial

GREY, BLUE, ORANGE, GREEN, RED = "#9aa0a6", "#1f6feb", "#d9730d", "#2a9d4a", "#c2255c"
Points = list[tuple[float, float]]
"""(item forwards so far, score)."""


@functools.cache
def costs(store: Store) -> dict[int, tuple[int, dict[str, Any]]]:
    """Number of each stage -> item forwards before it, and its row."""
    before, found = 0, {}
    for number, row in enumerate(stage_rows(store)):
        found[number] = (before, row)
        before += row["item_forwards"]
    return found


def cost_of(store: Store, trial: Trial) -> int:
    """Item forwards up to the genome of a trial."""
    before, row = costs(store)[trial.stage]
    step = re.search(r"step (\d+)", trial.label or "")
    last = row["first"] + int(step[1]) - 2 if step else trial.generation
    return before + store.usage.cost(trial.stage, row["first"], last).item_forwards


def candidates(store: Store) -> Points:
    """Candidates of evolution, each scored on its generation's search items."""
    own = [t for t in store.trials() if t.origin in ("sampled", "injected") and t.score is not None]
    firsts = {trial.generation: trial for trial in reversed(own)}
    by_generation = {generation: cost_of(store, trial) for generation, trial in firsts.items()}
    return [(by_generation[trial.generation], trial.score or 0.0) for trial in own]


def finalists(store: Store, rows: list[dict[str, Any]], *, learned: bool) -> Points:
    """The finalists of learned stages, or of the others, on the validation items."""
    points: Points = []
    for row in rows:
        trial = store.trial(row["id"])
        is_learned = bool(costs(store)[trial.stage][1]["gradients"])
        if is_learned == learned and row.get("validation") is not None:
            points.append((cost_of(store, trial), row["validation"]))
    return sorted(points)


def draw(store: Store, out: Path) -> None:
    """Writes the picture.

    Args:
        store: Of a finished study.
        out: File to write; its ending says which kind.
    """
    study = store.study()
    assert study is not None
    assert study.outcome is not None
    references = [r for r in study.outcome.references if r.get("validation") is not None]
    best_parent = max(r["validation"] for r in references if r["origin"] == "parent")
    best_hand = max((r["validation"] for r in references if r["origin"] == "hand"), default=best_parent)
    rows = list(study.outcome.finalists)
    learned = finalists(store, rows, learned=True)
    plt.rcParams["svg.hashsalt"] = "evomerge"
    figure, axes = plt.subplots(figsize=(8.4, 3.8), layout="constrained")
    if evolved := candidates(store):
        label = "candidate of evolution, its generation's items"
        axes.scatter(*zip(*evolved, strict=True), s=6, color=GREY, alpha=0.6, label=label, linewidths=0)
    if ends := finalists(store, rows, learned=False):
        axes.scatter(*zip(*ends, strict=True), s=28, color=BLUE, label="finalist of evolution", zorder=3)
    if learned:
        label = "learned by gradient"
        points = [(0.0, max(best_hand, best_parent)), *learned]
        axes.plot(*zip(*points, strict=True), color=RED, linewidth=2, marker="o", label=label)
    axes.axhline(best_hand, color=ORANGE, linestyle="--", label="best hand recipe")
    axes.axhline(best_parent, color=GREEN, linestyle=":", linewidth=2, label="best parent")
    axes.set_xlabel("item forwards, an item with its gradient counted as three")
    axes.set_ylabel("score on validation items")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False, ncols=3)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description="picture of a finished study")
    parser.add_argument("study", type=Path, help="study.db of a finished study")
    parser.add_argument("out", type=Path, help="file to write")
    arguments = parser.parse_args()
    store = Store.open(arguments.study)
    try:
        draw(store, arguments.out)
    finally:
        store.close()


if __name__ == "__main__":
    main()
