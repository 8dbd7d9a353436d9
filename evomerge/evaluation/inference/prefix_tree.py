"""What sequences of token ids share.

Prefixes worth computing once, and sequences as a tree of distinct tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FORWARD_COST = 96
"""What one more forward costs, in tokens."""
_SHORTEST = (
    16  # tokens below which a prefix is not shared: rows on top of a cache lose the fast causal kernel
)
_DEEPEST = 200  # most levels of prefixes within prefixes


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two sequences begin with alike.

    Args:
        a: Token ids.
        b: Token ids, of the same type of sequence.

    Returns:
        Length of the common prefix.
    """
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(k for k in range(shortest) if a[k] != b[k])


def shared_prefixes(
    contexts: Sequence[tuple[int, ...]], forward_cost: int = FORWARD_COST
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Finds the prefixes that pay for a prefill of their own.

    Walks the radix tree of the sorted contexts: a node of depth k with n contexts saves (n - 1) k tokens and
    costs about `forward_cost` tokens for one more forward. It is taken if that beats what its children save
    and k is at least 16.

    Args:
        contexts: Distinct token sequences: the choices of one item are no group.
        forward_cost: What one more forward costs, in tokens.

    Returns:
        (groups, rest): groups as (length of the prefix, indices of contexts), and indices of the contexts in
        no group.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    lcp = [common_prefix_length(contexts[a], contexts[b]) for a, b in pairwise(order)]

    def walk(low: int, high: int, level: int = 0) -> tuple[int, list[tuple[int, list[int]]], list[int]]:
        """Best of the contexts order[low:high]: (tokens saved, groups, rest)."""
        if high - low < 2 or level > _DEEPEST:
            return 0, [], order[low:high]
        depth = min(lcp[low : high - 1])
        bounds = [low, *(j + 1 for j in range(low, high - 1) if lcp[j] == depth), high]
        saved_here = (high - low - 1) * depth - forward_cost if depth >= _SHORTEST else 0
        saved_below, groups, rest = 0, [], []
        for a, b in pairwise(bounds):
            saved, child_groups, child_rest = walk(a, b, level + 1)
            saved_below += saved
            groups += child_groups
            rest += child_rest
        if saved_here > max(saved_below, 0):
            return saved_here, [(depth, order[low:high])], []
        return saved_below, groups, rest

    _, groups, rest = walk(0, len(order))
    return groups, rest


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Sequences merged where they begin alike, as one row of n nodes in depth-first order.

    Attributes:
        tokens: [n] token of each node.
        depths: [n] distance from the root.
        ends: [n] one past the last node of each node's subtree, so that node k is an ancestor of q (or q
            itself) if and only if k <= q < ends[k].
        paths: Of each sequence, its nodes.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]


def token_tree(sequences: Sequence[tuple[int, ...]]) -> TokenTree:
    """Builds the token tree of sequences.

    Args:
        sequences: Token ids; equal sequences and prefixes of others are allowed.

    Returns:
        The tree, with paths in the order of the sequences.
    """
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    before: tuple[int, ...] = ()
    path: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):  # sorted: a subtree is contiguous
        sequence = sequences[i]
        shared = common_prefix_length(sequence, before)
        path = path[:shared]
        for depth in range(shared, len(sequence)):
            parents.append(path[-1] if path else -1)
            depths.append(depth)
            path.append(len(tokens))
            tokens.append(sequence[depth])
        paths[i] = list(path)
        before = sequence
    ends = list(range(1, len(tokens) + 1))
    for node in range(len(tokens) - 1, -1, -1):
        if parents[node] >= 0:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return TokenTree(tokens, depths, ends, paths)


def visibility(trees: Sequence[TokenTree], past: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes what each node of a batch of trees attends to.

    Args:
        trees: B trees, each padded to a row of `width` nodes. A padding node attends to the prefix and
            itself, so that no row of the softmax is empty.
        past: Number P of tokens of a cached prefix, which every node attends to.
        width: Number Q of nodes of a row.

    Returns:
        (mask [B, Q, P + Q] of bool, logical positions of queries [B, Q], of keys [B, P + Q]).
    """
    ends = torch.zeros(len(trees), width, dtype=torch.long)
    depths = torch.zeros(len(trees), width, dtype=torch.long)
    for row, tree in enumerate(trees):
        ends[row, : len(tree.ends)] = torch.tensor(tree.ends)
        depths[row, : len(tree.depths)] = torch.tensor(tree.depths)
    nodes = torch.arange(width)
    ancestors = (nodes[None, None, :] <= nodes[None, :, None]) & (nodes[None, :, None] < ends[:, None, :])
    ancestors |= torch.eye(width, dtype=torch.bool)
    mask = torch.cat([torch.ones(len(trees), width, past, dtype=torch.bool), ancestors], 2)
    queries = depths + past
    keys = torch.cat([torch.arange(past).expand(len(trees), past), queries], 1)
    return mask, queries, keys
