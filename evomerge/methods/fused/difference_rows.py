"""What is known of the task vectors of many tensors: thresholds and norms as arrays, one row a tensor.

A candidate of a search asks every tensor for one threshold or norm each. Tables answer for all of them by
array operations; what no table holds is asked for one by one. The numbers are those of `MagnitudeTables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from evomerge.methods import random_masks
from evomerge.methods.fused.magnitude_tables import GRID, MagnitudeTables
from evomerge.methods.fused.weighted_sum import TensorPair

Array = np.ndarray[Any, np.dtype[Any]]


class DifferenceRows:
    """The task vectors of the rows of a table.

    Attributes:
        pairs: [rows][sources] each source's tensor and the base's.
        tables: Magnitudes of task vectors that a search shares.
        sizes: [rows, 1] int64, number of elements.
        widths: [rows, 1] int64, number of elements of a row of the tensor.
    """

    def __init__(self, pairs: Sequence[Sequence[TensorPair]], tables: MagnitudeTables) -> None:
        """Reads nothing yet.

        Args:
            pairs: [rows][sources], at least one of each.
            tables: Shared tables.
        """
        self.pairs = pairs
        self.tables = tables
        self.sizes: Array = np.array([[row[0].n] for row in pairs], np.int64)
        self.widths: Array = np.array([[row[0].width] for row in pairs], np.int64)
        self._hash_norms: dict[int, Array] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, sources)."""
        return len(self.pairs), len(self.pairs[0])

    def tops(self, counts: Array, wanted: Array) -> tuple[Array, Array, Array]:
        """The elements of largest magnitude, see `MagnitudeTables.top`.

        Args:
            counts: [rows, sources] int64, how many, in [0, size].
            wanted: [rows, sources] bool; the others are not looked up.

        Returns:
            [rows, sources] each: float32 threshold (infinite for none), int64 index of the last element at
            it (-1 for none), float64 sum of floor(unit * magnitude) over them (NaN where no table has it).
        """
        thresholds = np.full(self.shape, np.inf, np.float32)
        lasts = np.full(self.shape, -1, np.int64)
        norms = np.full(self.shape, np.nan)
        left = wanted & (counts > 0) & (self.sizes > 0)
        if left.any() and self._top_counts.any():
            guess = np.round(counts * (GRID / np.maximum(self.sizes, 1))).astype(np.int64)
            for near in (guess, guess + 1, guess - 1):
                at = np.clip(near - 1, 0, GRID - 2)[..., None]
                hit = left & (np.take_along_axis(self._top_counts, at, -1)[..., 0] == counts)
                results: tuple[Array, ...] = (thresholds, lasts, norms)
                for found, table in zip(results, self._top_tables, strict=True):
                    found[hit] = np.take_along_axis(table, at, -1)[..., 0][hit]
                left &= ~hit
        for row, i in np.argwhere(left).tolist():
            top = self.tables.top(self.pairs[row][i], int(counts[row, i]))
            thresholds[row, i], lasts[row, i] = top.threshold, top.last
        return thresholds, lasts, norms

    def hash_norms(self, key: int, keys: Array, bounds: Array, wanted: Array) -> Array:
        """Norms of what random masks keep, where a table has them.

        Args:
            key: What the keys depend on, such as the seed of a recipe.
            keys: [rows, sources, 2] int64, the mask keys, see `random_masks.split`.
            bounds: [rows, sources] int64, the hash below which an element is kept.
            wanted: [rows, sources] bool; the others are not looked up.

        Returns:
            [rows, sources] float64 sums of floor(unit * magnitude); NaN where no table has it.
        """
        norms = np.full(self.shape, np.nan)
        grid = random_masks.grid_bounds(GRID)
        at = np.minimum(np.searchsorted(grid, bounds), GRID - 1)
        hit = wanted & (grid[at] == bounds)
        if hit.any():
            if key not in self._hash_norms:
                self._hash_norms.clear()
                self._hash_norms[key] = self._hash_tables(keys)
            norms[hit] = np.take_along_axis(self._hash_norms[key], at[..., None], -1)[..., 0][hit]
        return norms

    @cached_property
    def units(self) -> Array:
        """[rows, sources] float64 units of norms, see `MagnitudeTables.unit`."""
        return np.array([[self.tables.unit(pair) for pair in row] for row in self.pairs])

    @cached_property
    def wholes(self) -> Array:
        """[rows, sources] float64 sums of floor(unit * magnitude) over all elements."""
        return np.array([[self.tables.whole_norm(pair) for pair in row] for row in self.pairs])

    def scales(self, norms: Array) -> Array:
        """The factors that restore the norms of the whole task vectors, see `MagnitudeTables.scale`.

        Args:
            norms: [rows, sources] sums of floor(unit * magnitude) over what is kept.

        Returns:
            [rows, sources] float64; NaN where the norm is NaN.
        """
        least = 1e-7 * self.units
        is_small = (self.wholes < least) | (norms < least)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(is_small, 1.0, self.wholes / norms)

    @cached_property
    def _tables_of_tops(self) -> tuple[Array, Array, Array, Array]:
        """[rows, sources, GRID - 1] each: counts, thresholds, lasts, norms; counts 0 without a table."""
        shape = (*self.shape, GRID - 1)
        counts, thresholds = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        lasts, norms = np.zeros(shape, np.int64), np.zeros(shape)
        self.tables.prepare([pair for pairs in self.pairs for pair in pairs])
        for row, pairs in enumerate(self.pairs):
            for i, pair in enumerate(pairs):
                found = self.tables.top_table(pair)
                if found is not None:
                    counts[row, i], thresholds[row, i] = found.counts, found.thresholds
                    lasts[row, i], norms[row, i] = found.lasts, self.tables.top_sums(pair)
        return counts, thresholds, lasts, norms

    @property
    def _top_counts(self) -> Array:
        return self._tables_of_tops[0]

    @property
    def _top_tables(self) -> tuple[Array, Array, Array]:
        return self._tables_of_tops[1:]

    def _hash_tables(self, keys: Array) -> Array:
        """[rows, sources, GRID] norms of what is below each bound of the grid; NaN without a table."""
        found = np.full((*self.shape, GRID), np.nan)
        for row, pairs in enumerate(self.pairs):
            for i, pair in enumerate(pairs):
                table = self.tables.hash_table(pair, (int(keys[row, i, 0]), int(keys[row, i, 1])))
                if table is not None:
                    found[row, i] = table
        return found
