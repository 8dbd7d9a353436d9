"""The kernels in C (`one_pass.c`), for tensors on the CPU in 16- and 32-bit float types.

They give the bits of `torch_kernels`, about five times faster.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused import c_library, torch_kernels
from evomerge.methods.fused.c_library import address, span, span_of
from evomerge.methods.fused.c_tables import hash_sums, rank_rows, top_k_sums, top_k_table
from evomerge.methods.fused.exact_products import REST_BITS
from evomerge.methods.fused.spans import parallel_map, pieces, pieces_between_cuts
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TopK, WeightedSum

__all__ = [
    "fits", "hash_sums", "l1_norms", "largest", "name", "product_sums", "projections", "rank_rows",
    "top_k_sums", "top_k_table", "write_sum",
]  # fmt: skip
Array = np.ndarray[Any, np.dtype[Any]]
name = "C"
_FEW = 4  # sources of `sweep_few`
_ALL = TopK(-1.0, 1 << 62, 1 << 62)


def fits(tensors: Sequence[Tensor | None], summands: Sequence[Summand] = ()) -> bool:
    """See `KernelBackend.fits`: the library takes the tensors, and ranks have 16 bits."""
    short_ranks = all(s.ranks is None or s.ranks.dtype == torch.uint16 for s in summands)
    return short_ranks and c_library.fits(tensors)


def write_sum(base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor) -> bool:
    """See `KernelBackend.write_sum`."""
    kind = _common_kind(total.summands)
    tensors = [*sources, out, *([] if base is None else [base])]
    one_type = len({t.dtype for t in tensors}) == 1 and out.dtype != torch.float16
    few = kind is not None and one_type and len(sources) <= _FEW

    def piece(start: int, stop: int) -> bool:
        if few and kind is not None:
            return _sweep_few(base, sources, total, kind, out, start, stop)
        return _sweep(base, sources, total, out, start, stop)

    n = out.numel()
    return all(parallel_map(pieces_between_cuts(n, total.summands, span_of(n)), piece))


def l1_norms(base: Tensor, source: Tensor, summand: Summand, unit: float) -> tuple[float, float]:
    """See `KernelBackend.l1_norms`."""

    def piece(start: int, stop: int) -> tuple[float, float]:
        totals = (ctypes.c_double * 2)()
        _, numbers, keys, _ = _encoded([summand], start)
        c_library.functions().norms(
            *span(start, stop),
            *c_library.pointer(base),
            *c_library.pointer(source),
            int(summand.kind),
            numbers,
            keys,
            c_library.pointer(summand.ranks)[0],
            ctypes.c_float(unit),
            totals,
        )
        return totals[0], totals[1]

    n = base.numel()
    parts = parallel_map(pieces_between_cuts(n, [summand], span_of(n)), piece)
    return math.fsum(part[0] for part in parts), math.fsum(part[1] for part in parts)


def largest(base: Tensor | None, sources: Sequence[Tensor]) -> list[float]:
    """See `KernelBackend.largest`."""
    pointers = (*c_library.pointer(base), c_library.addresses(sources), c_library.type_codes(sources))

    def piece(start: int, stop: int) -> Array:
        tops = np.zeros(len(sources), np.uint32)
        c_library.functions().largest(len(sources), *span(start, stop), *pointers, address(tops))
        return tops

    n = sources[0].numel()
    parts = parallel_map(pieces(n, span_of(n)), piece)
    tops = np.max(parts, axis=0) if parts else np.zeros(len(sources), np.uint32)
    found: list[float] = tops.view(np.float32).tolist()
    return found


def product_sums(
    base: Tensor | None,
    sources: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    exponents: Sequence[int],
) -> list[int]:
    """See `KernelBackend.product_sums`."""
    pointers = (*c_library.pointer(base), c_library.addresses(sources), c_library.type_codes(sources))
    which = np.array(pairs, np.int32)
    magic = np.array([[1.5 * 2.0 ** (52 - u), 1.5 * 2.0 ** (52 - REST_BITS - u)] for u in exponents])

    def piece(start: int, stop: int) -> list[list[int]]:
        sums = np.zeros((len(pairs), 2), np.int64)
        arrays = (address(which), address(magic), address(sums))
        bounds = span(start, stop)
        if c_library.functions().products(len(sources), *bounds, *pointers, len(pairs), *arrays):
            raise MemoryError("no memory for a block of elements")
        found: list[list[int]] = sums.tolist()
        return found

    parts = parallel_map(pieces(sources[0].numel(), torch_kernels.PRODUCTS_PIECE), piece)
    return [sum((part[p][0] << REST_BITS) + part[p][1] for part in parts) for p in range(len(pairs))]


def projections(gradient: Tensor, base: Tensor | None, sources: Sequence[Tensor]) -> Array:
    """See `KernelBackend.projections`."""
    pointers = (
        *c_library.pointer(gradient),
        *c_library.pointer(base),
        c_library.addresses(sources),
        c_library.type_codes(sources),
    )

    def piece(start: int, stop: int) -> Array:
        products = np.zeros(len(sources))
        c_library.functions().projections(len(sources), *span(start, stop), *pointers, address(products))
        return products

    parts = parallel_map(pieces(gradient.numel(), torch_kernels.PRODUCTS_PIECE), piece)
    total: Array = np.sum(parts, axis=0) if parts else np.zeros(len(sources))
    return total


def _sweep(
    base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor, start: int, stop: int
) -> bool:
    """Elements [start, stop) of the sum, for any types and masks; returns whether all are finite."""
    bad = c_library.functions().sweep(
        len(sources),
        *span(start, stop),
        *c_library.pointer(base),
        c_library.addresses(sources),
        c_library.type_codes(sources),
        *c_library.pointer(out),
        *_encoded(total.summands, start),
        *_how_to_sum(total),
    )
    return _is_finite(bad)


def _sweep_few(
    base: Tensor | None,
    sources: Sequence[Tensor],
    total: WeightedSum,
    kind: MaskKind,
    out: Tensor,
    start: int,
    stop: int,
) -> bool:
    """As `_sweep`, for few sources of one type and one kind of mask: everything stays in registers."""
    any_ranks = next((summand.ranks for summand in total.summands if summand.ranks is not None), None)
    as_kind = [_as_kind(summand, kind, any_ranks) for summand in total.summands]
    _, numbers, keys, ranks = _encoded(as_kind, start)
    target, type_code = c_library.pointer(out)
    bad = c_library.functions().sweep_few(
        len(sources),
        int(kind),
        type_code,
        *span(start, stop),
        c_library.pointer(base)[0],
        c_library.addresses(sources),
        target,
        numbers,
        keys,
        ranks,
        *_how_to_sum(total),
    )
    return _is_finite(bad)


def _is_finite(bad: int) -> bool:
    if bad < 0:
        raise MemoryError("no memory for a block of elements")
    return not bad


def _how_to_sum(total: WeightedSum) -> tuple[object, ...]:
    """elect, divide, divisor and lambda, as `one_pass.c` takes them."""
    if total.elect_sign and total.divisor is None:
        divide = 2
    elif total.divisor is None or total.divisor == 1:
        divide = 0
    else:
        divide = 1
    divisor = ctypes.c_float(total.divisor or 0.0)
    return (int(total.elect_sign), divide, divisor, ctypes.c_float(total.factor))


def _common_kind(summands: Sequence[Summand]) -> MaskKind | None:
    """The kind that all summands can be written as, if there is one that `sweep_few` knows."""
    kinds = {summand.kind for summand in summands} - {MaskKind.DENSE}
    bounded = any(summand.outer is not None for summand in summands)
    if len(kinds) > 1 or bounded:
        return None
    return kinds.pop() if kinds else MaskKind.DENSE


def _as_kind(summand: Summand, kind: MaskKind, ranks: Tensor | None) -> Summand:
    """The same summand with 'all elements' written as the given kind, and the bound of a hash inclusive.

    ranks: of any summand, for one that keeps all elements whatever their ranks.
    """
    if summand.kind is MaskKind.RANDOM:
        if summand.bound == -(1 << 31):
            return replace(summand, weight=0.0)
        return replace(summand, bound=summand.bound - 1)
    if summand.kind is MaskKind.DENSE:
        return replace(summand, kind=kind, inner=_ALL, bound=(1 << 31) - 1, low=math.inf, ranks=ranks)
    return summand


def _encoded(summands: Sequence[Summand], start: int) -> tuple[object, ...]:
    """kinds, numbers, keys and ranks of the summands, as `one_pass.c` takes them."""
    kinds = c_library.integers([s.kind for s in summands])
    numbers = c_library.floats([number for s in summands for number in s.numbers(start)])
    keys = c_library.integers([number for s in summands for number in (*s.key, s.bound)])
    return kinds, numbers, keys, c_library.addresses([s.ranks for s in summands])
