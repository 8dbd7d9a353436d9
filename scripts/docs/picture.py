"""Draws the picture of the README from a finished study: score against evaluations, beside the references.

python scripts/docs/picture.py results/demo/study.db docs/images/demo.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from evomerge.store import Store, Trial

GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#1f6feb", "#d9730d", "#2a9d4a"


def searched(trials: list[Trial]) -> tuple[list[int], list[float]]:
    """Number of each sampled candidate in the order of evaluation, and its search score."""
    scores = [t.score for t in trials if t.origin in ("sampled", "injected") and t.score is not None]
    return list(range(1, len(scores) + 1)), scores


def generation_means(trials: list[Trial]) -> tuple[list[float], list[float]]:
    """Place of each generation on the axis of evaluations, and its mean score."""
    places: list[float] = []
    means: list[float] = []
    done = 0
    for generation in sorted({t.generation for t in trials if t.origin == "sampled"}):
        scores = [t.score for t in trials if t.generation == generation and t.origin == "sampled" and t.score]
        places.append(done + len(scores) / 2)
        means.append(sum(scores) / len(scores))
        done += len(scores)
    return places, means


def draw(store: Store, out: Path) -> None:
    """Writes the picture as SVG.

    Args:
        store: of a finished study.
        out: file to write.
    """
    trials = store.trials()
    references = [t for t in trials if t.origin in ("parent", "hand") and t.score is not None]
    best_parent = max((t.score or 0.0 for t in references if t.origin == "parent"), default=0.0)
    best_hand = max((t.score or 0.0 for t in references if t.origin == "hand"), default=0.0)
    plt.rcParams["svg.hashsalt"] = "evomerge"
    figure, axes = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    axes.scatter(*searched(trials), s=7, color=GREY, alpha=0.7, label="candidate", linewidths=0)
    axes.plot(*generation_means(trials), color=BLUE, linewidth=2, label="mean of a generation")
    axes.axhline(best_hand, color=ORANGE, linestyle="--", label="best hand recipe")
    axes.axhline(best_parent, color=GREEN, linestyle=":", linewidth=2, label="best parent")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("score on search items")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", frameon=False, ncols=4)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description="picture of a finished study")
    parser.add_argument("study", type=Path, help="study.db of a finished study")
    parser.add_argument("out", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    store = Store.open(arguments.study)
    try:
        draw(store, arguments.out)
    finally:
        store.close()


if __name__ == "__main__":
    main()
