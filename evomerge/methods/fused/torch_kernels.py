"""The kernels in torch, piece by piece, on any device: the reference for every backend's bits.

Every operation is one IEEE operation on float32, in one order, whatever the pieces, threads or device: inputs
are upcast, and the result is rounded once. Sums that would depend on their order are sums of whole numbers
(see `one_pass.exact_unit` and `exact_products`); only `projections` sums rounded numbers, piece by piece in a
fixed order. All tensors are flat, contiguous and on one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.exact_division import divided
from evomerge.methods.fused.exact_products import REST_BITS
from evomerge.methods.fused.spans import parallel_map, pieces, pieces_between_cuts
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, WeightedSum

Array = np.ndarray[Any, np.dtype[Any]]
name = "torch"
PRODUCTS_PIECE = 1 << 20
"""Elements whose products are summed before the sums are: fixed, the same for all threads; at most 2**23."""
_CHUNK = 1 << 16  # elements held at a time on a CPU
_DEVICE_CHUNK = 1 << 24
_PIECE = 1 << 20


def fits(tensors: Sequence[Tensor | None], summands: Sequence[Summand] = ()) -> bool:
    """See `KernelBackend.fits`: always."""
    return True


def write_sum(base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor) -> bool:
    """See `KernelBackend.write_sum`."""
    chunk = _CHUNK if out.device.type == "cpu" else _DEVICE_CHUNK
    spans = pieces_between_cuts(out.numel(), total.summands, chunk)
    finite = [_write_piece(base, sources, total, out, *span) for span in spans]
    return bool(torch.stack(finite).all()) if finite else True


def l1_norms(base: Tensor, source: Tensor, summand: Summand, unit: float) -> tuple[float, float]:
    """See `KernelBackend.l1_norms`."""

    def piece(start: int, stop: int) -> tuple[float, float]:
        delta = difference(base, source, start, stop)
        left = masked(delta, summand, start)
        return _whole_sum(delta, unit), _whole_sum(left, unit)

    parts = parallel_map(pieces_between_cuts(base.numel(), [summand], _CHUNK), piece)
    return math.fsum(part[0] for part in parts), math.fsum(part[1] for part in parts)


def largest(base: Tensor | None, sources: Sequence[Tensor]) -> list[float]:
    """See `KernelBackend.largest`."""

    def piece(start: int, stop: int) -> Tensor:
        return torch.stack([x.abs().amax() for x in _vectors(base, sources, start, stop)])

    parts = parallel_map(pieces(sources[0].numel(), _PIECE), piece)
    return torch.stack(parts).amax(dim=0).tolist() if parts else [0.0] * len(sources)


def product_sums(
    base: Tensor | None,
    sources: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    exponents: Sequence[int],
) -> list[int]:
    """See `KernelBackend.product_sums`."""

    def piece(start: int, stop: int) -> list[list[int]]:
        wide = [x.double() for x in _vectors(base, sources, start, stop)]
        sums = []
        for (i, k), exponent in zip(pairs, exponents, strict=True):
            exact = wide[i] * wide[k] * 2.0**exponent
            whole = exact.round()
            rest = ((exact - whole) * 2.0**REST_BITS).round()
            sums.append(torch.stack([whole.long().sum(), rest.long().sum()]))
        found: list[list[int]] = torch.stack(sums).tolist()
        return found

    parts = parallel_map(pieces(sources[0].numel(), PRODUCTS_PIECE), piece)
    return [sum((part[p][0] << REST_BITS) + part[p][1] for part in parts) for p in range(len(pairs))]


def projections(gradient: Tensor, base: Tensor | None, sources: Sequence[Tensor]) -> Array:
    """See `KernelBackend.projections`. Copies in wider types are of a piece of one source at a time."""

    def piece(start: int, stop: int) -> Array:
        direction = gradient[start:stop].double()
        origin = None if base is None else base[start:stop].float()
        products = [
            direction @ (x[start:stop].float() if origin is None else x[start:stop].float() - origin).double()
            for x in sources
        ]
        found: Array = torch.stack(products).cpu().numpy()
        return found

    parts = parallel_map(pieces(gradient.numel(), PRODUCTS_PIECE), piece)
    total: Array = np.sum(parts, axis=0) if parts else np.zeros(len(sources))
    return total


def hash_sums(base: Tensor, source: Tensor, key: tuple[int, int], unit: float, grid: int) -> Array:
    """See `KernelBackend.hash_sums`."""
    bounds = random_masks.grid_bounds(grid)

    def piece(start: int, stop: int) -> Array:
        hashes = random_masks.hashed(random_masks.mixed(start, stop, base.device), key)
        cells = np.searchsorted(bounds, hashes.cpu().numpy().astype(np.int64), side="right")
        whole = (difference(base, source, start, stop).abs() * unit).floor()
        sums: Array = np.bincount(cells, weights=whole.cpu().numpy().astype(np.float64), minlength=grid)
        return sums

    parts = parallel_map(pieces(base.numel(), _PIECE), piece)
    total: Array = np.sum(parts, axis=0) if parts else np.zeros(grid)
    return total


def rank_rows(base: Tensor, source: Tensor, width: int, out: Tensor) -> float:
    """See `KernelBackend.rank_rows`: the inverse of a stable sort of each row."""

    def piece(start: int, stop: int) -> Tensor:
        size = difference(base, source, start, stop).abs().reshape(-1, width)
        order = size.argsort(dim=1, stable=True)
        position = torch.arange(width, dtype=torch.int32, device=order.device).expand_as(order)
        ranks = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, position)
        out[start:stop] = ranks.reshape(-1).to(out.dtype)
        return size.max()

    tops = parallel_map(whole_rows(base.numel(), width), piece)
    return float(torch.stack(tops).max()) if tops else 0.0


def top_k_table(base: Tensor, source: Tensor, counts: Sequence[int]) -> tuple[Array, Array]:
    """See `KernelBackend.top_k_table`: by one sort of (magnitude, index)."""
    n = base.numel()
    keys = np.empty(n, np.uint64)
    for start, stop in pieces(n, _PIECE):
        bits = difference(base, source, start, stop).abs().view(torch.int32).cpu().numpy().astype(np.uint64)
        index = np.arange(start, stop, dtype=np.uint64)
        keys[start:stop] = ((np.uint64(0x7FFFFFFF) - bits) << np.uint64(32)) | index
    keys.sort()  # largest magnitude first, of equal ones the first come first
    last = keys[np.array(counts, np.int64) - 1]
    thresholds = (np.uint64(0x7FFFFFFF) - (last >> np.uint64(32))).astype(np.uint32).view(np.float32)
    return thresholds, (last & np.uint64(0xFFFFFFFF)).astype(np.int64)


def top_k_sums(
    base: Tensor, source: Tensor, unit: float, counts: Sequence[int], thresholds: Array, lasts: Array
) -> Array:
    """See `KernelBackend.top_k_sums`."""
    distinct = np.unique(thresholds)[::-1]
    sums, many = np.zeros(len(distinct) + 1), np.zeros(len(distinct) + 1, np.int64)
    for start, stop in pieces(base.numel(), _PIECE):
        size = difference(base, source, start, stop).abs()
        place = np.searchsorted(-distinct, -size.cpu().numpy(), side="right")  # how many are no smaller
        whole = (size * unit).floor().cpu().numpy().astype(np.float64)
        sums += np.bincount(place, weights=whole, minlength=len(sums))
        many += np.bincount(place, minlength=len(many))
    return sums_of_largest(distinct, sums, many, unit, counts, thresholds)


def sums_of_largest(
    distinct: Array, sums: Array, many: Array, unit: float, counts: Sequence[int], thresholds: Array
) -> Array:
    """Sums over the k largest, from those between thresholds.

    Args:
        distinct: The distinct thresholds, descending.
        sums: [distinct + 1]: of floor(unit * x) over the x with distinct[i - 1] >= x > distinct[i].
        many: [distinct + 1]: how many such x there are.
        unit: The power of two.
        counts: The k.
        thresholds: The k-th largest of each.

    Returns:
        [counts] float64: what is above the threshold, and as many at it as are missing.
    """
    place = np.searchsorted(-distinct, -thresholds)
    missing = np.array(counts, np.int64) - np.cumsum(many)[place]
    whole = np.floor(thresholds.astype(np.float32) * np.float32(unit)).astype(np.float64)
    total: Array = np.cumsum(sums)[place] + missing * whole
    return total


def difference(base: Tensor, source: Tensor, start: int, stop: int) -> Tensor:
    """A piece of the difference of two flat tensors.

    Args:
        base: The base's tensor, [n].
        source: The source's tensor, [n].
        start: First element.
        stop: The element after the last.

    Returns:
        [stop - start] float32: source - base.
    """
    return source[start:stop].float() - base[start:stop].float()


def _vectors(base: Tensor | None, sources: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """A piece of each x_i - base, or of each x_i without a base, in float32."""
    parts = [x[start:stop].float() for x in sources]
    return parts if base is None else [x - base[start:stop].float() for x in parts]


def masked(delta: Tensor, summand: Summand, start: int) -> Tensor:
    """The elements of a piece of a difference that a summand keeps; zero elsewhere.

    Args:
        delta: [n] float32, the elements of the difference from index `start` on, up to the summand's next cut
            at most.
        summand: Says which are kept.
        start: Index of the first element in its tensor.

    Returns:
        [n] float32.
    """
    if summand.kind is MaskKind.DENSE:
        return delta
    if summand.kind is MaskKind.BAND:
        _, _, least, upper, _, _ = summand.numbers(start)
        size = delta.abs()
        return torch.where((size < least) | (size >= upper), 0.0, delta)
    hashes = random_masks.hashed(random_masks.mixed(start, start + len(delta), delta.device), summand.key)
    if summand.kind is MaskKind.RANDOM:
        return torch.where(hashes < summand.bound, delta, 0.0)
    assert summand.ranks is not None
    ranks = summand.ranks[start : start + len(delta)].to(torch.float32)
    probability = ranks * _float32(summand.step) + _float32(summand.low)
    return torch.where(hashes.to(torch.float32) < probability * 2.0**32 - 2.0**31, delta, 0.0)


def whole_rows(n: int, width: int) -> list[tuple[int, int]]:
    """Pieces of about a million elements that hold whole rows.

    Args:
        n: Number of elements, a multiple of `width`.
        width: Number of elements of a row; 0 only for n = 0.

    Returns:
        The pieces in order.
    """
    width = max(1, width)
    return pieces(n, max(1, _PIECE // width) * width)


def _write_piece(
    base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor, start: int, stop: int
) -> Tensor:
    """Writes one piece of the sum; returns a scalar bool: whether all of it is finite."""
    zero = torch.zeros(stop - start, device=out.device)
    b = zero if base is None else base[start:stop].float()
    terms = [
        masked(x[start:stop].float() - b, summand, start) * _float32(summand.scale) * _float32(summand.weight)
        for x, summand in zip(sources, total.summands, strict=True)
    ]
    mixed = functools.reduce(torch.add, terms, zero)
    if total.elect_sign:
        mixed = _agreeing_sum(mixed, terms, total, zero)
    if total.divisor is not None and total.divisor != 1:
        mixed = divided(mixed, total.divisor)
    result = (b + mixed * _float32(total.factor)).to(out.dtype)
    out[start:stop] = result
    return torch.isfinite(result).all()


def _agreeing_sum(mixed: Tensor, terms: Sequence[Tensor], total: WeightedSum, zero: Tensor) -> Tensor:
    """The sum of the terms with the sign of the whole sum, divided by their weights without a divisor."""
    sign = torch.where(mixed >= 0, 1.0, -1.0)
    signed = [term * sign for term in terms]
    agreeing = [torch.where(term <= 0, 0.0, term) for term in signed]
    mixed = functools.reduce(torch.add, agreeing, zero) * sign
    if total.divisor is not None:
        return mixed
    weights = [
        torch.where(term > 0, _float32(summand.weight), 0.0)
        for term, summand in zip(signed, total.summands, strict=True)
    ]
    divisor = functools.reduce(torch.add, weights, zero)
    return mixed / torch.where(divisor.abs() < 1e-6, 1.0, divisor)


def _whole_sum(x: Tensor, unit: float) -> float:
    """The sum of floor(unit * |x|), exact."""
    return float((x.abs() * unit).floor().sum(dtype=torch.float64))


def _float32(x: float) -> float:
    """x rounded to float32."""
    return float(np.float32(x))
