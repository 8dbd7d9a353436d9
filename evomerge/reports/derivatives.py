"""Derivatives of a candidate's loss by its coefficients: shards of items added up, with their standard error.

Opens no model: what takes derivatives is passed in by `evomerge.launch.derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ConfigError
from evomerge.evaluation import Items
from evomerge.evaluation.estimates import Estimate

MOST_SHARDS = 16
"""Parts that items are cut into, for the standard error."""


@dataclass(frozen=True, slots=True)
class Derivative:
    """How the score changes with one coefficient.

    Attributes:
        axis: Name of the coefficient.
        value: The candidate's own value.
        slope: Change of the right answers' mean probability for one unit of the coefficient, with its error;
            None where the method's derivative by it is not known.
        scanned: Slope of the scan of the same axis, where its points are stored.
    """

    axis: str
    value: float
    slope: Estimate | None
    scanned: Estimate | None = None

    def to_plain(self) -> dict[str, Any]:
        """Plain data: attributes by name, errors beside their means."""
        data: dict[str, Any] = {"axis": self.axis, "value": self.value}
        for name, estimate in (("derivative", self.slope), ("slope", self.scanned)):
            if estimate is not None:
                data |= {name: estimate.mean, f"{name}_error": estimate.error}
        return data


def shards(items: Items) -> list[dict[str, tuple[str, ...]]]:
    """Cuts items into parts of the same make-up: as many of each task in each, give or take one.

    Args:
        items: Task -> items, at least 2 of each task.

    Returns:
        2 to `MOST_SHARDS` parts, each with items of every task.

    Raises:
        ConfigError: A task has fewer than 2 items.
    """
    count = min(MOST_SHARDS, *map(len, items.values()))
    if count < 2:
        raise ConfigError("a derivative needs at least 2 items of each task for an error; give more --items")
    return [{task: tuple(ids[first::count]) for task, ids in items.items()} for first in range(count)]


def estimate(parts: Sequence[float]) -> Estimate:
    """The sum of a quantity over shards, with its standard error from how the shards differ.

    Args:
        parts: Of each shard, at least 2.

    Returns:
        The sum, and sqrt(S / (S - 1) sum (part - mean)^2) for S shards.
    """
    count, total = len(parts), math.fsum(parts)
    spread = math.fsum((part - total / count) ** 2 for part in parts)
    return Estimate(total, math.sqrt(spread * count / (count - 1)), count)


def shard_weights(items: Items, shares: Mapping[str, float]) -> dict[str, float]:
    """The weight of an item of each task, such that losses of all items add up to the mean of the tasks.

    Args:
        items: Task -> items.
        shares: Task -> its share in the objective, of either sign.

    Returns:
        Task -> weight.
    """
    return {task: abs(shares.get(task, 0.0)) / len(ids) for task, ids in items.items()}
