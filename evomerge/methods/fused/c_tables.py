"""The tables of magnitudes in C (`tables.c`), for tensors that `c_library` takes: `torch_kernels`' numbers.

Every pass over the elements is cut into spans that threads share.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused import c_library, torch_kernels
from evomerge.methods.fused.c_library import address, span, span_of
from evomerge.methods.fused.spans import Span, parallel_map, pieces

Array = np.ndarray[Any, np.dtype[Any]]
_BUCKETS = 1 << 19  # as in `tables.c`, as are the next two
_SPARE = 8
_BLOCK = 1024
_MOST_KEPT = 16  # arrays of 2 MB at most
_lock = threading.Lock()
_kept: dict[Any, list[Array]] = {}
_LISTED = 8  # a span's list of values that share buckets has room for one of so many elements


def top_k_table(base: Tensor, source: Tensor, counts: Sequence[int]) -> tuple[Array, Array]:
    """See `KernelBackend.top_k_table`: by two passes, three where many values share a bucket."""
    ks = np.array(counts, np.int64)
    spans = pieces(base.numel(), span_of(base.numel()))
    tensors = (*c_library.pointer(base), *c_library.pointer(source))
    with _zeros(np.uint32, len(spans)) as buckets, _zeros(np.uint16, 1) as [wanted]:
        return _table(spans, tensors, ks, buckets, wanted)


def _table(
    spans: Sequence[Span], tensors: tuple[object, ...], ks: Array, buckets: Sequence[Array], wanted: Array
) -> tuple[Array, Array]:
    """Thresholds and last indices of the k largest. buckets, wanted: zeros."""
    lists = _counted(spans, tensors, buckets)
    chosen, rooms = np.zeros(len(ks), np.int32), np.zeros(len(ks), np.int64)
    sizes = np.zeros(len(spans), np.int64)
    arrays = (address(wanted), address(chosen), address(rooms), address(sizes))
    _check(
        c_library.functions().choose_buckets(len(spans), _pointers(buckets), len(ks), address(ks), *arrays)
    )
    sorted_lists = _sorted(spans, tensors, lists, wanted, sizes)
    values = np.zeros(len(ks), np.uint32)
    come = np.zeros((len(spans), len(ks)), np.int64)
    lengths = np.array([len(each) for each in sorted_lists], np.int64)
    arrays = (address(chosen), address(rooms), address(values), address(come))
    of_spans = (_pointers(buckets), _pointers(sorted_lists), address(lengths))
    _check(c_library.functions().find_thresholds(len(spans), *of_spans, len(ks), *arrays))
    return values.view(np.float32), _lasts(spans, tensors, values, rooms, come, wanted)


def top_k_sums(
    base: Tensor, source: Tensor, unit: float, counts: Sequence[int], thresholds: Array, lasts: Array
) -> Array:
    """See `KernelBackend.top_k_sums`: sums between the thresholds, then what is missing at each."""
    bits = np.ascontiguousarray(thresholds).view(np.uint32)
    distinct = np.unique(bits)[::-1].copy()
    numbers = np.zeros(_BUCKETS, np.uint16)
    c_library.functions().number_buckets(len(distinct), address(distinct), address(numbers))
    tensors = (*c_library.pointer(base), *c_library.pointer(source))

    def piece(start: int, stop: int) -> tuple[Array, Array]:
        sums, many = np.zeros(len(distinct) + 1), np.zeros(len(distinct) + 1, np.int64)
        arrays = (address(distinct), address(numbers), address(sums), address(many))
        scaled = (ctypes.c_float(unit), len(distinct))
        c_library.functions().sums_between(*span(start, stop), *tensors, *scaled, *arrays)
        return sums, many

    parts = parallel_map(pieces(base.numel(), span_of(base.numel())), piece)
    sums, many = (np.sum([part[i] for part in parts], axis=0) for i in range(2))
    return torch_kernels.sums_of_largest(distinct.view(np.float32), sums, many, unit, counts, thresholds)


def hash_sums(base: Tensor, source: Tensor, key: tuple[int, int], unit: float, grid: int) -> Array:
    """See `KernelBackend.hash_sums`."""
    numbers = (*map(ctypes.c_int32, key), ctypes.c_float(unit), grid)

    def piece(start: int, stop: int) -> Array:
        sums = np.zeros(grid)
        pointers = (*c_library.pointer(base), *c_library.pointer(source))
        c_library.functions().hash_sums(*span(start, stop), *pointers, *numbers, address(sums))
        return sums

    parts = parallel_map(pieces(base.numel(), 1 << 20), piece)
    total: Array = np.sum(parts, axis=0) if parts else np.zeros(grid)
    return total


def rank_rows(base: Tensor, source: Tensor, width: int, out: Tensor) -> float:
    """See `KernelBackend.rank_rows`: torch does ranks beyond 16 bits."""
    if out.dtype != torch.uint16:
        return torch_kernels.rank_rows(base, source, width, out)

    ranks = ctypes.c_void_p(out.data_ptr())
    c_library.functions().use_large_pages(ranks, ctypes.c_int64(out.nbytes))

    def piece(start: int, stop: int) -> Array:
        top = np.zeros(1, np.uint32)
        numbers = (*span(start, stop), ctypes.c_int64(width))
        pointers = (*c_library.pointer(base), *c_library.pointer(source))
        _check(c_library.functions().rank_rows(*numbers, *pointers, ranks, address(top)))
        return top

    tops = parallel_map(torch_kernels.whole_rows(base.numel(), width), piece)
    return float(np.max(tops, axis=0).view(np.float32)[0]) if tops else 0.0


@contextmanager
def _zeros(dtype: Any, count: int) -> Iterator[list[Array]]:
    """Arrays of zeros, one entry a bucket, that were used before: first touches of new ones cost more."""
    key = np.dtype(dtype)
    with _lock:
        kept = _kept.setdefault(key, [])
        taken = [kept.pop() for _ in range(min(count, len(kept)))]
    taken += [np.zeros(_BUCKETS, key) for _ in range(count - len(taken))]
    yield taken
    for array in taken:
        array.fill(0)
    with _lock:
        kept.extend(taken[: _MOST_KEPT - len(kept)])


def _counted(
    spans: Sequence[Span], tensors: tuple[object, ...], buckets: Sequence[Array]
) -> list[Array | None]:
    """Counts each span's buckets; lists its values that do not begin one, None for too many of them."""
    places = {start: place for place, (start, _) in enumerate(spans)}

    def piece(start: int, stop: int) -> Array | None:
        listed = np.empty((stop - start) // _LISTED + _BLOCK, np.uint32)
        length = np.zeros(1, np.int64)
        arrays = (address(buckets[places[start]]), address(listed), ctypes.c_int64(len(listed)))
        c_library.functions().count_buckets(*span(start, stop), *tensors, *arrays, address(length))
        return listed[: length[0]] if length[0] >= 0 else None

    return parallel_map(spans, piece)


def _sorted(
    spans: Sequence[Span],
    tensors: tuple[object, ...],
    lists: Sequence[Array | None],
    wanted: Array,
    sizes: Array,
) -> list[Array]:
    """Each span's values in wanted buckets that do not begin them, ascending."""
    places = {start: place for place, (start, _) in enumerate(spans)}

    def piece(start: int, stop: int) -> Array:
        listed = lists[places[start]]
        length = np.array([0 if listed is None else len(listed)], np.int64)
        if listed is None:
            listed = np.empty(sizes[places[start]] + 1, np.uint32)
            arrays = (address(wanted), address(listed), address(length))
            c_library.functions().list_inexact(*span(start, stop), *tensors, *arrays)
        _check(c_library.functions().sort_wanted(address(listed), address(length), address(wanted)))
        return listed[: length[0]]

    return parallel_map(spans, piece)


def _lasts(
    spans: Sequence[Span],
    tensors: tuple[object, ...],
    values: Array,
    rooms: Array,
    come: Array,
    wanted: Array,
) -> Array:
    """For each k the index of the last of the k largest."""
    first, alone = np.zeros(len(values) + _SPARE + 1, np.int32), np.zeros(1, np.int32)
    numbers = c_library.functions().number_thresholds(
        len(values), address(values), address(wanted), address(first), address(alone)
    )
    places = {start: place for place, (start, _) in enumerate(spans)}
    lasts = np.full(len(values), -1, np.int64)

    def piece(start: int, stop: int) -> None:
        arrays = (address(values), address(rooms), address(come[places[start]]))
        shared = (numbers, int(alone[0]), address(wanted), address(first), address(lasts))
        functions = c_library.functions()
        _check(functions.find_lasts(*span(start, stop), *tensors, len(values), *arrays, *shared))

    parallel_map(spans, piece)
    return lasts


def _pointers(arrays: Sequence[Array]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])


def _check(status: int) -> None:
    if status < 0:
        raise MemoryError("no memory for a table of magnitudes")
    if status:
        raise AssertionError("the counts of a table of magnitudes do not fit together")
