"""Divides the layers of a stack among cards, each a run of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def split_layers(loads: Sequence[int], capacities: Sequence[int]) -> list[range]:
    """Divides layers into a run for each card.

    Args:
        loads: Bytes of each layer.
        capacities: Bytes that each card has for layers; may be negative.

    Returns:
        A run of layers for each card, in order. The largest overflow of a card is as small as can be, and
        then the sum of all overflows.
    """
    sums = [0, *itertools.accumulate(loads)]
    low, high = -max(capacities), sums[-1] - min(capacities)
    while low < high:
        middle = (low + high) // 2
        if _fill(sums, [c + middle for c in capacities]):
            high = middle
        else:
            low = middle + 1
    return _least_overflow(sums, capacities, low)


def _fill(sums: Sequence[int], rooms: Sequence[int]) -> bool:
    """Whether layers fill one card after the other and none is left. sums: of the loads before each layer."""
    start = 0
    for room in rooms:
        if room < 0:
            return False
        start = bisect.bisect_right(sums, sums[start] + room) - 1
    return start == len(sums) - 1


def _least_overflow(sums: Sequence[int], capacities: Sequence[int], most: int) -> list[range]:
    """The runs whose overflows have the smallest sum, of those where each is at most `most`."""
    costs: dict[int, tuple[int, list[range]]] = {0: (0, [])}  # layers placed -> (overflow, runs)
    for capacity in capacities:
        reached: dict[int, tuple[int, list[range]]] = {}
        for start, (cost, runs) in costs.items():
            for stop in range(start, len(sums)):
                overflow = sums[stop] - sums[start] - capacity
                if overflow > most:
                    break
                total = cost + max(0, overflow)
                if stop not in reached or total < reached[stop][0]:
                    reached[stop] = (total, [*runs, range(start, stop)])
        costs = reached
    return costs[len(sums) - 1][1]
