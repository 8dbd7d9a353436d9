"""Sharing read from token ids: which prefixes are worth computing once, and sequences as a tree of distinct tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

LAUNCH = 96  # what one more forward costs, in tokens
_SHORT = 16  # tokens below which a prefix is not shared: rows on top of a cache lose the fast causal kernel
_DEEP = 200  # levels of prefixes within prefixes that are looked at


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(k for k in range(most) if a[k] != b[k])


def shared_prefixes(
    contexts: Sequence[tuple[int, ...]], launch: int = LAUNCH
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """(groups, left over): prefixes that pay for a prefill of their own, as (length, indices of contexts), and the rest.

    Walks the radix tree of the sorted contexts: a node of depth k with n contexts saves (n - 1) k tokens and costs about
    `launch` tokens for one more forward; it is taken if that beats what its children save and k is at least 16. Contexts
    should be distinct: the choices of one item are no group.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    lcp = [common(contexts[a], contexts[b]) for a, b in pairwise(order)]

    def walk(low: int, high: int, level: int = 0) -> tuple[int, list[tuple[int, list[int]]], list[int]]:
        """Best of the contexts order[low:high]: (tokens saved, groups, left over)."""
        if high - low < 2 or level > _DEEP:
            return 0, [], order[low:high]
        depth = min(lcp[low : high - 1])
        cuts = [low, *(j + 1 for j in range(low, high - 1) if lcp[j] == depth), high]
        here = (high - low - 1) * depth - launch if depth >= _SHORT else 0
        below, groups, left = 0, [], []
        for a, b in pairwise(cuts):
            saved, more, rest = walk(a, b, level + 1)
            below += saved
            groups += more
            left += rest
        if here > max(below, 0):
            return here, [(depth, order[low:high])], []
        return below, groups, left

    _, groups, left = walk(0, len(order))
    return groups, left


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences merged where they begin alike, as one row in depth-first order.

    tokens, depths, ends [n]: token, distance from the root, and one past the last node of the subtree of each node, so
    that node k is an ancestor of q (or q itself) iff k <= q < ends[k]. paths: of each sequence, its nodes.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]


def tree(sequences: Sequence[tuple[int, ...]]) -> Tree:
    """The token tree of sequences, equal ones and prefixes of others included."""
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    before: tuple[int, ...] = ()
    trail: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):  # sorted: a subtree is contiguous
        sequence = sequences[i]
        kept = common(sequence, before)
        trail = trail[:kept]
        for depth in range(kept, len(sequence)):
            parents.append(trail[-1] if trail else -1)
            depths.append(depth)
            trail.append(len(tokens))
            tokens.append(sequence[depth])
        paths[i], before = list(trail), sequence
    ends = list(range(1, len(tokens) + 1))
    for node in range(len(tokens) - 1, -1, -1):
        if parents[node] >= 0:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return Tree(tokens, depths, ends, paths)


def visible(trees: Sequence[Tree], past: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each node of a batch of trees sees: (mask [B, Q, past + Q] of bool, positions [B, Q] of queries, of keys [B, past + Q]).

    past: tokens of a cached prefix that every node sees; width: Q, rows are padded to it. A padding node sees the prefix
    and itself, so that no row of the softmax is empty.
    """
    ends = torch.zeros(len(trees), width, dtype=torch.long)
    depths = torch.zeros(len(trees), width, dtype=torch.long)
    for row, t in enumerate(trees):
        ends[row, : len(t.ends)] = torch.tensor(t.ends)
        depths[row, : len(t.depths)] = torch.tensor(t.depths)
    at = torch.arange(width)
    own = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < ends[:, None, :])
    own |= torch.eye(width, dtype=torch.bool)
    mask = torch.cat([torch.ones(len(trees), width, past, dtype=torch.bool), own], 2)
    queries = depths + past
    keys = torch.cat([torch.arange(past).expand(len(trees), past), queries], 1)
    return mask, queries, keys
