"""What a search asks again and again about a parent's difference from its base, found once and kept.

Thresholds and norms for a thousand densities come from one sort (or one pass over the mask) of a tensor; any other
density is found directly and remembered. Both give the same numbers: a table changes the time, never the result.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.fused import c_library, one_pass
from evomerge.methods.fused.weighted_sum import NOTHING, MaskKind, Summand, TensorPair, TopK
from evomerge.methods.ties import count

GRID = 1000  # a table answers the densities 1/GRID, 2/GRID, ...: those a search proposes
_SMALL = 1 << 16  # below this many elements finding a threshold directly costs no more than a table
_KEPT = 200_000  # answers remembered
T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


class MagnitudeTables:
    """Answers about pairs. `build`: make tables, for a search; without it every answer is found directly."""

    def __init__(self, *, build: bool = False, ranks_bytes: int = 0) -> None:
        """ranks_bytes: memory that the rank tables of DELLA may take; beyond it ranks are found anew each time."""
        self.build, self.room = build, ranks_bytes
        self._known: dict[Hashable, object] = {}
        self._ranks: dict[Hashable, Tensor] = {}

    def unit(self, pair: TensorPair) -> float:
        """The unit of `sweep.norms`."""
        return self._remember(
            pair, ("unit",), lambda: one_pass.unit_of(one_pass.largest(pair.base, pair.source), pair.n)
        )

    def level(self, pair: TensorPair, k: int) -> TopK:
        """The k elements of largest magnitude; of equal ones the first come first."""
        if k <= 0 or pair.n == 0:
            return NOTHING
        if self.build and pair.id is not None and pair.n > _SMALL and (found := self._sorted(pair).get(k)):
            return found[0]
        return self._remember(pair, ("level", k), lambda: _level(pair, k))

    def prepare(self, pairs: Sequence[TensorPair]) -> None:
        """Makes the tables of magnitudes of several pairs side by side."""
        wanted = [
            pair
            for pair in pairs
            if self.build
            and pair.id is not None
            and pair.n > _SMALL
            and (pair.id, "sorted") not in self._known
        ]
        if len(wanted) > 1 and torch.get_num_threads() > 1:
            list(_builders(torch.get_num_threads()).map(self._sorted, wanted))

    def scale(self, pair: TensorPair, share: Summand, memo: Hashable) -> float:
        """||x - base||_1 / ||what the share keeps||_1; 1 where either is below 1e-7. memo: what the mask depends on."""
        unit = self.unit(pair)
        total, kept = self._norms(pair, share, memo, unit)
        return 1.0 if total < 1e-7 * unit or kept < 1e-7 * unit else total / kept

    def ranks(self, pair: TensorPair) -> Tensor:
        """[n] uint16 (int32 for rows beyond 65536): rank of each magnitude in its row (last axis), ascending."""
        if pair.id in self._ranks:
            return self._ranks[pair.id]
        found = _ranks(pair)
        if self.build and pair.id is not None and found.nbytes <= self.room:
            self.room -= found.nbytes
            self._ranks[pair.id] = found
        return found

    def _norms(self, pair: TensorPair, share: Summand, memo: Hashable, unit: float) -> tuple[float, float]:
        if self.build and pair.id is not None and pair.n > _SMALL:
            if share.kind is MaskKind.RANDOM:
                table, bounds = self._remember(
                    pair, ("hashes", share.key), lambda: _hash_table(pair, share, unit)
                )
                at = int(np.searchsorted(bounds, share.bound))
                if at < len(bounds) and bounds[at] == share.bound:
                    return float(table[-1]), float(table[at])
            elif (
                share.kind is MaskKind.BAND
                and share.outer is None
                and isinstance(memo, int)
                and (found := self._sorted(pair).get(memo))
            ):
                return self._remember(
                    pair,
                    ("norm",),
                    lambda: one_pass.norms(pair.base, pair.source, Summand(MaskKind.DENSE, 1.0), unit)[0],
                ), found[1]
        return self._remember(
            pair,
            ("norms", share.kind, share.key, memo),
            lambda: one_pass.norms(pair.base, pair.source, share, unit),
        )

    def _sorted(self, pair: TensorPair) -> dict[int, tuple[TopK, float]]:
        return self._remember(pair, ("sorted",), lambda: level_table(pair, self.unit(pair)))

    def _remember(self, pair: TensorPair, what: tuple[Hashable, ...], find: Callable[[], T]) -> T:
        if pair.id is None:
            return find()
        key = (pair.id, *what)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = find()
        return self._known[key]  # type: ignore[return-value]


@functools.cache
def _builders(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tables")


def _level(pair: TensorPair, k: int) -> TopK:
    """By two histograms of the bit patterns of |x - base|, no sort; then a scan for the last of the equal ones."""
    prefix, above = _from_top(one_pass.histogram(pair.base, pair.source), k)
    low, above_low = _from_top(one_pass.histogram(pair.base, pair.source, prefix), k - above)
    threshold = float(np.array([(prefix << 16) | low], np.int32).view(np.float32)[0])
    room = k - above - above_low  # how many of those at the threshold belong
    b, x = pair.base.reshape(-1), pair.source.reshape(-1)
    for start in range(0, pair.n, 1 << 20):
        stop = min(pair.n, start + (1 << 20))
        equal = (one_pass.difference(b, x, start, stop).abs() == threshold).nonzero().reshape(-1)
        if len(equal) >= room:
            return TopK(threshold, start + int(equal[room - 1]))
        room -= len(equal)
    return TopK(threshold, pair.n)  # only with NaN among the magnitudes; the merge refuses those


def _from_top(counts: Array, k: int) -> tuple[int, int]:
    """(the bin that holds the k-th from the top, how many lie in the bins above it)."""
    above = np.cumsum(counts[::-1])
    position = min(int(np.searchsorted(above, k)), len(counts) - 1)
    return len(counts) - 1 - position, int(above[position - 1]) if position else 0


def level_table(pair: TensorPair, unit: float) -> dict[int, tuple[TopK, float]]:
    """k -> (level, sum of floor(unit * magnitude) over it) for the k of every density on the grid."""
    ends = sorted({count(j / GRID, pair.n) for j in range(1, GRID)})
    return (
        _by_histogram(pair, unit, ends) if c_library.fits([pair.base, pair.source]) else None
    ) or _by_sort(pair, unit, ends)


def _by_histogram(pair: TensorPair, unit: float, ends: Sequence[int]) -> dict[int, tuple[TopK, float]] | None:
    """In C, by histograms; None if the magnitudes hold NaN or memory is short."""
    lib, ks = c_library.library(), np.array(ends, np.int64)
    thresholds, lasts, sums = np.zeros(len(ks), np.float32), np.zeros(len(ks), np.int64), np.zeros(len(ks))
    assert lib is not None
    arrays = [ctypes.c_void_p(a.ctypes.data) for a in (ks, thresholds, lasts, sums)]
    tensors = (*c_library.pointer(pair.base), *c_library.pointer(pair.source))
    if lib.levels(ctypes.c_int64(pair.n), *tensors, ctypes.c_float(unit), len(ks), *arrays):
        return None
    return {
        k: (TopK(float(t), int(last)), float(s))
        for k, t, last, s in zip(ends, thresholds, lasts, sums, strict=True)
    }


def _by_sort(pair: TensorPair, unit: float, ends: Sequence[int]) -> dict[int, tuple[TopK, float]]:
    n = pair.n
    keys = np.empty(n, np.uint64)
    b, x = pair.base.reshape(-1), pair.source.reshape(-1)
    for start in range(0, n, 1 << 20):
        stop = min(n, start + (1 << 20))
        bits = one_pass.difference(b, x, start, stop).abs().view(torch.int32).cpu().numpy().astype(np.uint64)
        keys[start:stop] = ((np.uint64(0x7FFFFFFF) - bits) << np.uint64(32)) | np.arange(
            start, stop, dtype=np.uint64
        )
    keys.sort()  # largest magnitude first, of equal ones the first come first
    table, done, total = {}, 0, 0.0
    for k in ends:
        total += float(np.floor(_magnitudes(keys[done:k]) * np.float32(unit)).sum(dtype=np.float64))
        table[k] = (
            TopK(float(_magnitudes(keys[k - 1 : k])[0]), int(keys[k - 1] & np.uint64(0xFFFFFFFF))),
            total,
        )
        done = k
    return table


def _magnitudes(keys: Array) -> Array:
    return (np.uint64(0x7FFFFFFF) - (keys >> np.uint64(32))).astype(np.uint32).view(np.float32)


def _hash_table(pair: TensorPair, share: Summand, unit: float) -> tuple[Array, Array]:
    """(sums of floor(unit * magnitude) over what each bound keeps, those bounds), for every density on the grid."""
    bounds = np.array([*(random_masks.bound(j / GRID) for j in range(1, GRID)), 1 << 31], np.int64)
    work = _hash_sums_c if c_library.fits([pair.base, pair.source]) else _hash_sums_torch
    parts = one_pass.each(pair.n, 1 << 20, functools.partial(work, pair, share.key, unit, bounds))
    return np.cumsum(np.sum(parts, axis=0)), bounds


def _hash_sums_c(
    pair: TensorPair, key: tuple[int, int], unit: float, bounds: Array, start: int, stop: int
) -> Array:
    lib, sums = c_library.library(), np.zeros(GRID)
    assert lib is not None
    tensors = (*c_library.pointer(pair.base), *c_library.pointer(pair.source))
    address = ctypes.c_void_p(sums.ctypes.data)
    lib.hash_sums(
        ctypes.c_int64(start),
        ctypes.c_int64(stop),
        *tensors,
        *map(ctypes.c_int32, key),
        ctypes.c_float(unit),
        GRID,
        address,
    )
    return sums


def _hash_sums_torch(
    pair: TensorPair, key: tuple[int, int], unit: float, bounds: Array, start: int, stop: int
) -> Array:
    b, x = pair.base.reshape(-1), pair.source.reshape(-1)
    u = random_masks.hashed(random_masks.mixed(start, stop, b.device), key).cpu().numpy().astype(np.int64)
    q = (one_pass.difference(b, x, start, stop).abs() * unit).floor().cpu().numpy().astype(np.float64)
    sums: Array = np.bincount(np.searchsorted(bounds, u, side="right"), weights=q, minlength=GRID)
    return sums


def _ranks(pair: TensorPair) -> Tensor:
    """Row by row: the inverse of a stable sort of the magnitudes."""
    width = pair.base.shape[-1] if pair.base.dim() else 1
    kind = torch.uint16 if width <= 65536 else torch.int32
    out = torch.empty(pair.n, dtype=kind, device=pair.base.device)
    size = max(1, (1 << 20) // max(1, width)) * max(1, width)  # whole rows
    compiled = kind == torch.uint16 and c_library.fits([pair.base, pair.source])
    one_pass.each(pair.n, size, functools.partial(_ranks_c if compiled else _ranks_torch, pair, width, out))
    return out


def _ranks_c(pair: TensorPair, width: int, out: Tensor, start: int, stop: int) -> None:
    lib = c_library.library()
    assert lib is not None
    span = (ctypes.c_int64(start), ctypes.c_int64(stop), ctypes.c_int64(width))
    if lib.rank_rows(
        *span, *c_library.pointer(pair.base), *c_library.pointer(pair.source), ctypes.c_void_p(out.data_ptr())
    ):
        raise MemoryError("no memory to sort a row")


def _ranks_torch(pair: TensorPair, width: int, out: Tensor, start: int, stop: int) -> None:
    b, x = pair.base.reshape(-1), pair.source.reshape(-1)
    order = one_pass.difference(b, x, start, stop).abs().reshape(-1, width).argsort(dim=1, stable=True)
    place = torch.arange(width, dtype=torch.int32, device=order.device).expand_as(order)
    out[start:stop] = (
        torch.empty_like(order, dtype=torch.int32).scatter_(1, order, place).reshape(-1).to(out.dtype)
    )
