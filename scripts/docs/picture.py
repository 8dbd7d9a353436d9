"""Draws the picture of the README from a finished study: score against cost, beside the references.

python scripts/docs/picture.py results/demo/study.db docs/images/demo.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from evomerge.reports.stages import stage_rows
from evomerge.store import Store

GREY, BLUE, ORANGE, GREEN, RED = "#9aa0a6", "#1f6feb", "#d9730d", "#2a9d4a", "#c2255c"
Points = list[tuple[float, float]]
"""(item forwards so far, score on search items)."""


def evolved(store: Store) -> tuple[Points, Points]:
    """Candidates of evolution, and the means of their generations."""
    candidates: Points = []
    means: Points = []
    before = 0
    for number, row in enumerate(stage_rows(store)):
        own = [t for t in store.trials() if t.stage == number and t.origin in ("sampled", "injected")]
        for generation in sorted({trial.generation for trial in own}):
            cost = before + store.usage.cost(number, row["first"], generation).item_forwards
            scores = [t.score for t in own if t.generation == generation and t.score is not None]
            candidates += [(cost, score) for score in scores]
            if scores:
                means.append((cost, sum(scores) / len(scores)))
        before += row["item_forwards"]
    return candidates, means


def learned(store: Store) -> Points:
    """The genomes of a learned stage that were scored by the tasks' metrics: its end and earlier ones."""
    points: Points = []
    before = 0
    for number, row in enumerate(stage_rows(store)):
        for trial in store.trials():
            if trial.stage != number or trial.origin != "mean" or trial.score is None or not row["gradients"]:
                continue
            step = re.search(r"step (\d+)", trial.label or "")
            last = row["last"] if step is None else row["first"] + int(step[1]) - 2
            points.append((before + store.usage.cost(number, row["first"], last).item_forwards, trial.score))
        before += row["item_forwards"]
    return sorted(points)


def draw(store: Store, out: Path) -> None:
    """Writes the picture.

    Args:
        store: Of a finished study.
        out: File to write; its ending says which kind.
    """
    references = [t for t in store.trials() if t.origin in ("parent", "hand") and t.score is not None]
    best_parent = max((t.score or 0.0 for t in references if t.origin == "parent"), default=0.0)
    best_hand = max((t.score or 0.0 for t in references if t.origin == "hand"), default=0.0)
    candidates, means = evolved(store)
    steps = learned(store)
    plt.rcParams["svg.hashsalt"] = "evomerge"
    figure, axes = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    if candidates:
        axes.scatter(
            *zip(*candidates, strict=True), s=7, color=GREY, alpha=0.7, label="candidate", linewidths=0
        )
        axes.plot(*zip(*means, strict=True), color=BLUE, linewidth=2, label="mean of a generation")
    if steps:
        axes.plot(*zip(*steps, strict=True), color=RED, linewidth=2, marker="o", label="learned by gradient")
    axes.axhline(best_hand, color=ORANGE, linestyle="--", label="best hand recipe")
    axes.axhline(best_parent, color=GREEN, linestyle=":", linewidth=2, label="best parent")
    axes.set_xlabel("item forwards, an item with its gradient counted as three")
    axes.set_ylabel("score on search items")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False, ncols=5)
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
