"""Prompts that begin alike, prefilled level by level: every distinct beginning is computed once, then forked.

Between two cuts of depth a and b only the distinct beginnings of length b are fed, b - a tokens each, on top of what their
own beginnings of length a left in the cache. No row holds padding or another row's tokens, so that nothing is masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from evomerge.evaluation.inference.prefix_tree import common

_CANDIDATES = 48  # most depths at which a cut is considered: those where most prompts part


def cuts(prompts: Sequence[tuple[int, ...]], width: int, launch: int) -> list[int]:
    """Depths, ascending, at which feeding prompts in levels costs least; all leave each prompt at least one token.

    width: tokens that each prompt takes up in a forward over all of it; launch: what one more forward costs, in tokens.
    """
    ordered = sorted(prompts)
    shared = [common(a, b) for a, b in pairwise(ordered)]
    most = min(map(len, prompts)) - 1
    parting = Counter(min(depth, most) for depth in shared)
    depths = sorted(depth for depth, _ in parting.most_common(_CANDIDATES) if depth)
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]  # cost in tokens, and cuts, of getting to each depth
    reached = [0]
    for depth in depths:
        rows = 1 + sum(d < depth for d in shared)  # distinct beginnings of this length
        cost, path = min(
            (cost + rows * (depth - a), path) for a, (cost, path) in zip(reached, best, strict=True)
        )
        best.append((cost + launch, (*path, depth)))
        reached.append(depth)
    _, path = min(
        (cost + len(prompts) * (width - a), path) for a, (cost, path) in zip(reached, best, strict=True)
    )
    return list(path)


def levels(
    prompts: Sequence[tuple[int, ...]], depths: Sequence[int]
) -> list[tuple[list[tuple[int, ...]], list[int]]]:
    """Of each cut: (tokens of its distinct beginnings since the cut before, of each row that follows the row it goes on from).

    The rows that follow are the next cut's beginnings, and after the last cut the prompts.
    """
    found: list[tuple[list[tuple[int, ...]], list[int]]] = []
    before = 0
    for number, depth in enumerate(depths):
        rows = {begin: row for row, begin in enumerate(dict.fromkeys(p[:depth] for p in prompts))}
        after = (
            list(dict.fromkeys(p[: depths[number + 1]] for p in prompts))
            if number + 1 < len(depths)
            else list(prompts)
        )
        found.append(([begin[before:] for begin in rows], [rows[p[:depth]] for p in after]))
        before = depth
    return found
