"""A task whose scores are sums of logits, and recipes of the tiny models that it scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation import Evaluator, Items, ItemScore, Role
from evomerge.recipes import Mix, Recipe, params
from evomerge.workers.worker import Worker

ITEMS: Items = {"first": ("1", "2", "3"), "second": ("4",)}


class Logits:
    """An evaluator: an item is a prompt of one token, its value a number of the last logits.

    `before` may spoil it.
    """

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before

    def items(self, role: Role) -> Items:
        """The same for every role."""
        return ITEMS

    def score(self, model: Any, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Exact numbers: any bit of the weights shows."""
        scores = []
        for task, ids in items.items():
            for item in ids:
                with torch.no_grad():
                    logits = model(torch.tensor([[int(item), 5, 7]])).logits
                scores.append(
                    ItemScore(
                        task, item, float(logits[0, -1].double() @ torch.arange(1, 17, dtype=torch.float64))
                    )
                )
        self.before()
        return tuple(scores), {task: math.fsum(s.value for s in scores if s.task == task) for task in items}


def recipe(
    weight: float = 0.7, method: str = "task_arithmetic", at: Mapping[int, Mix] | None = None
) -> Recipe:
    """One method with one weight everywhere; `at` replaces layers."""

    def mix(layer: int | None) -> Mix:
        return Mix(
            method, (("a", layer), ("b", layer)), ("base", layer), params({"weight": (weight, weight / 2)})
        )

    layers = [(at or {}).get(i, mix(i)) for i in range(3)]
    return Recipe("base", tuple(layers), mix(None), mix(None))


def worker(parents: Mapping[str, Checkpoint], evaluator: Evaluator | None = None) -> Worker:
    """A worker of the small models, which scores by logits unless another evaluator is given."""
    return Worker(parents, "base", evaluator or Logits(), dtype="bfloat16")
