"""A landscape that needs no model: what a recipe scores is a function of its numbers. Loads no torch, so that
processes of workers start quickly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.recipes import Filtered, Mix, Recipe, Setting


def numbers(value: Setting) -> list[float]:
    """Every number of a setting."""
    return [number for _, number in value.cases] if isinstance(value, Filtered) else [value]


def weights(mix: Mix, models: Sequence[str]) -> list[float]:
    """What share of each model a mix takes, roughly: enough for a landscape."""
    own = dict(mix.params).get("weight")
    found = dict.fromkeys(models, 0.0)
    for i, (name, _) in enumerate(mix.sources):
        if name in found:
            setting = own[i] if isinstance(own, tuple) else 1.0
            found[name] = math.fsum(numbers(setting)) / len(numbers(setting))
    return list(found.values())


def height(recipe: Recipe, models: Sequence[str] = ("a", "b")) -> float:
    """A smooth function of a recipe's numbers in (0, 1], largest where layer i takes 0.9 - 0.2 i of a and 0.4
    + 0.1 i of b.
    """
    error = 0.0
    for i, mix in enumerate(recipe.mixes):
        a, b = weights(mix, models)
        error += (a - (0.9 - 0.2 * i)) ** 2 + (b - (0.4 + 0.1 * i)) ** 2
    return math.exp(-error / len(recipe.mixes))


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") / 2**64


def evaluation(recipe: Recipe, items: Items) -> Evaluation:
    """Each item is right with the probability `height`, decided by a hash of recipe and item."""
    p, key = height(recipe), recipe.id
    scores = tuple(
        ItemScore(task, item, float(uniform(key, task, item) < p))
        for task, ids in items.items()
        for item in ids
    )
    metrics = {
        task: math.fsum(s.value for s in scores if s.task == task) / len(ids) for task, ids in items.items()
    }
    return Evaluation(recipe.id, scores, metrics, {"merge": 0.0, "score": 0.0})
