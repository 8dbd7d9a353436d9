"""Work on a tensor piece by piece: the pieces, and running them on several threads in a fixed order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from evomerge.methods.fused.weighted_sum import Summand

T = TypeVar("T")
Span = tuple[int, int]
"""Elements [start, stop) of a flat tensor."""


def pieces(n: int, size: int) -> list[Span]:
    """Cuts n elements into pieces.

    Args:
        n: Number of elements.
        size: Most elements of a piece, at least 1.

    Returns:
        The pieces in order; none for n = 0.
    """
    return [(start, min(n, start + size)) for start in range(0, n, size)]


def pieces_between_cuts(n: int, summands: Iterable[Summand], size: int) -> list[Span]:
    """Cuts n elements into pieces in each of which the summands' thresholds are constant.

    Args:
        n: Number of elements.
        summands: Their `cuts` are the indices at which a threshold changes.
        size: Most elements of a piece, at least 1.

    Returns:
        The pieces in order, none of them across a cut.
    """
    inner = {cut for summand in summands for cut in summand.cuts() if 0 < cut < n}
    ends = sorted({0, n, *inner})
    return [
        (first + start, first + stop)
        for first, last in itertools.pairwise(ends)
        for start, stop in pieces(last - first, size)
    ]


def parallel_map(spans: Sequence[Span], work: Callable[[int, int], T]) -> list[T]:
    """Runs a function on every piece, on as many threads as torch uses.

    Args:
        spans: The pieces.
        work: Called with (start, stop) of each.

    Returns:
        What `work` returned, in the order of the pieces.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(spans) < 2:
        return [work(*span) for span in spans]
    return list(_executor(threads).map(lambda span: work(*span), spans))


@functools.cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")
