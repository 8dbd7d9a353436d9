"""What a search asks of its parents again and again: thresholds, norms, ranks, dot products, computed once.

Thresholds and norms for a thousand densities come from a few passes over a tensor; any other density is
computed directly and cached. Both give the same numbers: a table changes the time, never the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.fused import one_pass, pair_measures, torch_kernels
from evomerge.methods.fused.table_files import TableFiles
from evomerge.methods.fused.weighted_sum import TOP_NONE, MaskKind, Summand, TensorPair, TopK

GRID = 1000
"""A table answers the densities 1/GRID, 2/GRID, ...: those that a search proposes."""
_SMALL = 1 << 16  # elements up to which a sort takes less than counting does
_SHARED = 1 << 18  # elements of a tensor for each thread, from which on the threads share its passes
_LARGEST_CACHE = 200_000  # entries, after which the cache starts anew
T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


def top_count(density: float, n: int) -> int:
    """How many of n elements a density keeps, counted as mergekit does.

    Args:
        density: In [0, 1].
        n: Number of elements.

    Returns:
        max(1, int(density * n)); 0 at density 0.
    """
    return max(1, int(density * n)) if density > 0 else 0


@dataclass(frozen=True, slots=True)
class TopTable:
    """The k elements of largest magnitude of one difference, for many k.

    Attributes:
        counts: [m] int64: the k, ascending.
        thresholds: [m] float32: magnitude of the k-th largest element.
        lasts: [m] int64: index of the last of the elements of this magnitude that belong.
    """

    counts: Array
    thresholds: Array
    lasts: Array

    def place(self, k: int) -> int | None:
        """Where a k stands in the table.

        Args:
            k: How many elements.

        Returns:
            Its index in `counts`; None where the table has not this k.
        """
        place = int(np.searchsorted(self.counts, k))
        return place if place < len(self.counts) and self.counts[place] == k else None

    def find(self, k: int) -> TopK | None:
        """Looks the k largest elements up.

        Args:
            k: How many elements.

        Returns:
            Their threshold; None where the table has not this k.
        """
        place = self.place(k)
        return None if place is None else self.at(place)

    def at(self, place: int) -> TopK:
        """The k largest elements at a place of the table.

        Args:
            place: Index into `counts`.

        Returns:
            Their threshold.
        """
        return TopK(float(self.thresholds[place]), int(self.lasts[place]), int(self.counts[place]))


_Form = tuple[Callable[[Any], Sequence[Array]], Callable[[Sequence[Array]], Any]]
_NUMBER: _Form = (lambda number: [np.array(number)], lambda arrays: float(arrays[0]))
_KEPT: dict[Hashable, _Form] = {
    "top table": (
        lambda table: [table.counts, table.thresholds, table.lasts],
        lambda arrays: TopTable(*arrays),
    ),
    "top sums": (lambda sums: [sums], lambda arrays: arrays[0]),
    "hashes": (list, tuple),
    "unit": _NUMBER,
    "norm": _NUMBER,
}
"""What `TableFiles` keeps, to arrays and back."""


class MagnitudeTables:
    """Magnitudes of task vectors, computed when first asked for and cached by the pair's id.

    A single merge needs none of it (`MagnitudeTables()`); a search shares one object between its candidates:

        tables = MagnitudeTables(build=True, ranks_bytes=1 << 30)
        merge_tensor(method.task_vector_sum, inputs, values, out, tables)
    """

    def __init__(self, *, build: bool = False, ranks_bytes: int = 0) -> None:
        """An empty cache.

        Args:
            build: Compute whole tables, as a search wants; without it every answer is computed directly.
            ranks_bytes: Memory that the rank tables of DELLA may take; beyond it ranks are computed anew each
                time.
        """
        self.build = build
        self._ranks_bytes_left = ranks_bytes
        self._cache: dict[Hashable, object] = {}
        self._ranks: dict[Hashable, Tensor] = {}
        self._products: dict[frozenset[Hashable], float] = {}
        self._files: TableFiles | None = None

    def keep_on_disk(self, files: TableFiles) -> None:
        """Reads tables from disk from now on, and writes those that are not there.

        Args:
            files: The tables of the models that are merged.
        """
        self._files = files

    def unit(self, pair: TensorPair) -> float:
        """The unit of a pair's norms, see `one_pass.exact_unit`.

        Args:
            pair: Two tensors.

        Returns:
            A power of two.
        """

        def compute() -> float:
            return one_pass.exact_unit(one_pass.largest_difference(pair.base, pair.source), pair.n)

        return self._cached(pair, ("unit",), compute)

    def dot_products(
        self, base: Tensor | None, sources: Sequence[Tensor], ids: Sequence[Hashable]
    ) -> list[list[float]]:
        """Exact dot products of all pairs of x_i - base (of x_i without a base), measured once.

        Args:
            base: The base's tensor or None.
            sources: The sources' tensors, of one shape.
            ids: What is known of each x_i - base, or of each x_i, is cached under; None for not cached.

        Returns:
            A symmetric matrix, [sources][sources].
        """
        count = len(sources)
        keys = {(i, k): frozenset((ids[i], ids[k])) for i in range(count) for k in range(i + 1)}
        missing = [pair for pair, key in keys.items() if None in key or key not in self._products]
        found = {pair: self._products[key] for pair, key in keys.items() if pair not in missing}
        if missing:
            measured = one_pass.dot_products(base, sources, missing)
            found |= dict(zip(missing, measured, strict=True))
            if len(self._products) >= _LARGEST_CACHE:
                self._products.clear()
            self._products |= {keys[pair]: found[pair] for pair in missing if None not in keys[pair]}
        return [[found[max(i, k), min(i, k)] for k in range(count)] for i in range(count)]

    def top(self, pair: TensorPair, k: int) -> TopK:
        """The k elements of largest |x - base|; of equal ones the first come first.

        Args:
            pair: Two tensors of n elements.
            k: In [0, n].

        Returns:
            The threshold and the last of the elements at it.
        """
        if k <= 0 or pair.n == 0:
            return TOP_NONE
        table = self.top_table(pair)
        known = None if table is None else table.find(k)
        if known is not None:
            return known
        return self._cached(pair, ("top", k), lambda: _top_table(pair, [k]).at(0))

    def prepare(self, pairs: Sequence[TensorPair]) -> None:
        """Builds the tables of several pairs side by side: in few launches on a device, else on threads.

        Args:
            pairs: Those about to be asked for.
        """
        missing = [
            pair for pair in pairs if self._has_table(pair) and (pair.id, "top table") not in self._cache
        ]
        self._measure([pair for pair in missing if pair_measures.measures(pair)])
        threads = torch.get_num_threads()
        left = [
            pair
            for pair in missing
            if (pair.id, "top table") not in self._cache and pair.n < threads * _SHARED
        ]
        if len(left) > 1 and threads > 1:
            list(_table_builders(threads).map(self._top_table, left))

    def _measure(self, pairs: Sequence[TensorPair]) -> None:
        """Caches what a device measures of pairs at once: tables, their norms, units and whole norms."""
        if not pairs:
            return
        counts = [_counts(pair) for pair in pairs]
        for pair, ks, found in zip(pairs, counts, pair_measures.measured(pairs, counts), strict=True):
            table = TopTable(np.array(ks, np.int64), found.thresholds, found.lasts)
            self._cache[(pair.id, "unit")] = found.unit
            self._cache[(pair.id, "norm")] = found.whole
            self._cache[(pair.id, "top table")] = table
            self._cache[(pair.id, "top sums")] = found.norms

    def top_table(self, pair: TensorPair) -> TopTable | None:
        """The k largest elements for every density of the grid.

        Args:
            pair: Two tensors.

        Returns:
            The table, of GRID - 1 densities; None where a pair has none.
        """
        return self._top_table(pair) if self._has_table(pair) else None

    def top_sums(self, pair: TensorPair) -> Array:
        """The norms of what is largest.

        Args:
            pair: Two tensors that have a table.

        Returns:
            For each k of `top_table` the sum of floor(unit * magnitude) over the k largest, float64.
        """

        def compute() -> Array:
            table, unit = self._top_table(pair), self.unit(pair)
            base, source = pair.base.reshape(-1), pair.source.reshape(-1)
            numbers = (table.counts.tolist(), table.thresholds, table.lasts)
            return one_pass.backend_for([base, source]).top_k_sums(base, source, unit, *numbers)

        return self._cached(pair, ("top sums",), compute)

    def scale(self, pair: TensorPair, summand: Summand) -> float:
        """The factor that gives what a summand keeps the L1 norm of the whole difference.

        Args:
            pair: Two tensors.
            summand: Its mask says which elements are kept.

        Returns:
            ||x - base||_1 / ||what is kept||_1; 1 where either is below 1e-7.
        """
        unit = self.unit(pair)
        whole, left = self._norms(pair, summand, unit)
        if whole < 1e-7 * unit or left < 1e-7 * unit:
            return 1.0
        return whole / left

    def ranks(self, pair: TensorPair) -> Tensor:
        """Ranks of |x - base| within each row (last axis), ascending; of equal ones the first come first.

        Args:
            pair: Two tensors of n elements.

        Returns:
            [n] uint16; int32 for rows beyond 65536 elements.
        """
        if pair.id in self._ranks:
            return self._ranks[pair.id]
        ranks, top = _ranks(pair)
        self._cached(pair, ("unit",), lambda: one_pass.exact_unit(top, pair.n))
        if self.build and pair.id is not None and ranks.nbytes <= self._ranks_bytes_left:
            self._ranks_bytes_left -= ranks.nbytes
            self._ranks[pair.id] = ranks
        return ranks

    def kept_ranks(self, pair: TensorPair) -> Tensor | None:
        """The ranks of a pair, where there is room to keep them; see `ranks`.

        Args:
            pair: Two tensors of n elements.

        Returns:
            [n], the same tensor at every call; None where they would be computed anew each time.
        """
        ranks = self.ranks(pair)
        return ranks if pair.id in self._ranks else None

    def hash_table(self, pair: TensorPair, key: tuple[int, int]) -> Array | None:
        """Norms of what random masks keep of a pair, for every density of the grid.

        Args:
            pair: Two tensors.
            key: Of the mask, see `random_masks.split`.

        Returns:
            [GRID] float64 norms in units below each of `random_masks.grid_bounds`; None where a pair has no
            table.
        """
        if not self._has_table(pair):
            return None
        unit = self.unit(pair)
        return self._cached(pair, ("hashes", key), lambda: _hash_table(pair, key, unit))[0]

    def whole_norm(self, pair: TensorPair) -> float:
        """The sum of floor(unit * |x - base|) over all elements.

        Args:
            pair: Two tensors.

        Returns:
            The norm in units.
        """
        return self._whole_norm(pair, self.unit(pair))

    def _has_table(self, pair: TensorPair) -> bool:
        return self.build and pair.id is not None and pair.n > 0

    def _norms(self, pair: TensorPair, summand: Summand, unit: float) -> tuple[float, float]:
        """(norm of the whole difference, norm of what is kept), both in units."""
        from_table = self._norms_from_table(pair, summand, unit) if self._has_table(pair) else None
        if from_table is not None:
            return from_table

        def compute() -> tuple[float, float]:
            return one_pass.l1_norms(pair.base, pair.source, summand, unit)

        return self._cached(pair, ("norms", summand.mask), compute)

    def _norms_from_table(
        self, pair: TensorPair, summand: Summand, unit: float
    ) -> tuple[float, float] | None:
        """The same from a table: of random masks and of the k largest, at the densities of the grid."""
        if summand.kind is MaskKind.RANDOM:
            table, bounds = self._cached(
                pair, ("hashes", summand.key), lambda: _hash_table(pair, summand.key, unit)
            )
            position = int(np.searchsorted(bounds, summand.bound))
            if position < len(bounds) and bounds[position] == summand.bound:
                return float(table[-1]), float(table[position])
        elif summand.kind is MaskKind.BAND and summand.outer is None:
            place = self._top_table(pair).place(summand.inner.count)
            if place is not None:
                return self._whole_norm(pair, unit), float(self.top_sums(pair)[place])
        return None

    def _whole_norm(self, pair: TensorPair, unit: float) -> float:
        everything = Summand(MaskKind.DENSE, 1.0)
        return self._cached(
            pair, ("norm",), lambda: one_pass.l1_norms(pair.base, pair.source, everything, unit)[0]
        )

    def _top_table(self, pair: TensorPair) -> TopTable:
        return self._cached(pair, ("top table",), lambda: _top_table(pair, _counts(pair)))

    def _measured(self, pair: TensorPair, what: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
        """What is on disk, if it is of a kind that is kept there, else what is computed."""
        if self._files is None or what[0] not in _KEPT:
            return compute()
        to_arrays, from_arrays = _KEPT[what[0]]
        arrays = self._files.read(pair.id, what)
        if arrays is not None:
            return from_arrays(arrays)  # type: ignore[no-any-return]
        found = compute()
        self._files.write(pair.id, what, to_arrays(found))
        return found

    def _cached(self, pair: TensorPair, what: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
        if pair.id is None:
            return compute()
        key = (pair.id, *what)
        if key not in self._cache:
            if len(self._cache) >= _LARGEST_CACHE:
                self._cache.clear()
            self._cache[key] = self._measured(pair, what, compute)
        return self._cache[key]  # type: ignore[return-value]


@functools.cache
def _table_builders(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tables")


def _counts(pair: TensorPair) -> list[int]:
    """The k of a table: `top_count` of every density of the grid."""
    counts: list[int] = np.maximum(1, (np.arange(1, GRID) / GRID * pair.n).astype(np.int64)).tolist()
    return counts


def _top_table(pair: TensorPair, counts: Sequence[int]) -> TopTable:
    base, source = pair.base.reshape(-1), pair.source.reshape(-1)
    backend = torch_kernels if pair.n <= _SMALL else one_pass.backend_for([base, source])
    distinct, places = np.unique(np.array(counts, np.int64), return_inverse=True)
    thresholds, lasts = backend.top_k_table(base, source, distinct.tolist())
    return TopTable(distinct[places], thresholds[places], lasts[places])


def _hash_table(pair: TensorPair, key: tuple[int, int], unit: float) -> tuple[Array, Array]:
    """(sums of floor(unit * magnitude) below each bound, the bounds), for every density of the grid."""
    base, source = pair.base.reshape(-1), pair.source.reshape(-1)
    sums = one_pass.backend_for([base, source]).hash_sums(base, source, key, unit, GRID)
    return np.cumsum(sums), random_masks.grid_bounds(GRID)


def _ranks(pair: TensorPair) -> tuple[Tensor, float]:
    """(ranks of a pair, its largest magnitude)."""
    dtype = torch.uint16 if pair.width <= 65536 else torch.int32
    out = torch.empty(pair.n, dtype=dtype, device=pair.base.device)
    base, source = pair.base.reshape(-1), pair.source.reshape(-1)
    return out, one_pass.backend_for([base, source]).rank_rows(base, source, pair.width, out)
