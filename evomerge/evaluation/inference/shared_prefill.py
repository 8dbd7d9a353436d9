"""Prefill of prompts that begin alike, level by level.

Every distinct beginning is computed once, then forked.

Between two cuts of depth a and b only the distinct beginnings of length b are fed, b - a tokens each, on top
of what their own beginnings of length a left in the cache. No row holds padding or another row's tokens, so
that nothing is masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from evomerge.evaluation.inference.prefix_tree import common_prefix_length

_CANDIDATES = 48  # most depths at which a cut is considered: those where most prompts part


def cut_depths(prompts: Sequence[tuple[int, ...]], width: int, forward_cost: int) -> list[int]:
    """Finds the depths at which prefill by levels costs least, by dynamic programming over candidate depths.

    Args:
        prompts: Token ids, each at least one.
        width: Tokens that each prompt takes up in one forward over all of it.
        forward_cost: What one more forward costs, in tokens.

    Returns:
        Depths, ascending; all leave each prompt at least one token. Empty where one forward over all is
        cheapest.
    """
    ordered = sorted(prompts)
    shared = [common_prefix_length(a, b) for a, b in pairwise(ordered)]
    deepest = min(map(len, prompts)) - 1
    parting = Counter(min(depth, deepest) for depth in shared)
    depths = sorted(depth for depth, _ in parting.most_common(_CANDIDATES) if depth)
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]  # cost in tokens, and cuts, of getting to each depth
    reached = [0]
    for depth in depths:
        rows = 1 + sum(d < depth for d in shared)  # distinct beginnings of this length
        cost, path = min(
            (cost + rows * (depth - start), path) for start, (cost, path) in zip(reached, best, strict=True)
        )
        best.append((cost + forward_cost, (*path, depth)))
        reached.append(depth)
    _, path = min(
        (cost + len(prompts) * (width - start), path)
        for start, (cost, path) in zip(reached, best, strict=True)
    )
    return list(path)


def levels(
    prompts: Sequence[tuple[int, ...]], depths: Sequence[int]
) -> list[tuple[list[tuple[int, ...]], list[int]]]:
    """Splits prompts at depths.

    Args:
        prompts: Token ids.
        depths: Result of `cut_depths`.

    Returns:
        Of each cut (tokens, index): the tokens of its distinct beginnings since the cut before, and of each
        row that follows the row that it continues. The rows that follow are the next cut's beginnings, and
        after the last cut the prompts.
    """
    result: list[tuple[list[tuple[int, ...]], list[int]]] = []
    before = 0
    for number, depth in enumerate(depths):
        rows = {begin: row for row, begin in enumerate(dict.fromkeys(p[:depth] for p in prompts))}
        following = list(prompts)
        if number + 1 < len(depths):
            following = list(dict.fromkeys(p[: depths[number + 1]] for p in prompts))
        result.append(([begin[before:] for begin in rows], [rows[p[:depth]] for p in following]))
        before = depth
    return result
