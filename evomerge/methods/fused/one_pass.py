"""One pass over the tensors of a sum: in torch, chunk by chunk, which is the law, or in C with the same bits.

Every operation is one IEEE operation on float32, in one order, whatever the chunks, threads or device: inputs are
upcast, and the result is rounded once. Sums that would depend on their order are sums of whole numbers (see `unit_of`).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.fused import c_library
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TopK, WeightedSum

T = TypeVar("T")
_JOB = 1 << 18  # elements that are worth a thread of their own
_PIECE = (
    1 << 20
)  # elements whose products are summed before the sums are: fixed, so that threads change nothing
_CHUNK = 1 << 16  # elements the torch version holds at a time on a CPU
_DEVICE_CHUNK = 1 << 24
_FEW = 4  # sources of `sweep_few`
_ALL = TopK(-1.0, 1 << 62)


def run(base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor) -> bool:
    """Writes base + factor * sum / divisor into `out`; returns whether all of it is finite.

    base: None for a sum of the sources themselves; all of one shape, contiguous, on one device, of any float type.
    """
    n = out.numel()
    flat = [t.reshape(-1) for t in sources]
    b = None if base is None else base.reshape(-1)
    target = out.view(-1)
    if _compiled([base, *sources, out], total.shares):
        return all(_each(_jobs(n, total, _share_of(n)), functools.partial(_sweep_c, b, flat, total, target)))
    chunk = _CHUNK if out.device.type == "cpu" else _DEVICE_CHUNK
    finite = [_sweep_torch(b, flat, total, target, *span) for span in _jobs(n, total, chunk)]
    return bool(torch.stack(finite).all()) if finite else True


def keep(delta: Tensor, share: Summand, start: int) -> Tensor:
    """The elements of delta [n] (indices from `start` to the share's next cut) that a share keeps; zero elsewhere."""
    if share.kind is MaskKind.BAND:
        _, _, low, high, _, _ = share.numbers(start)
        size = delta.abs()
        return torch.where((size < low) | (size >= high), 0.0, delta)
    if share.kind is MaskKind.DENSE:
        return delta
    u = random_masks.hashed(random_masks.mixed(start, start + len(delta), delta.device), share.key)
    if share.kind is MaskKind.RANDOM:
        return torch.where(u < share.bound, delta, 0.0)
    assert share.ranks is not None
    p = share.ranks[start : start + len(delta)].to(torch.float32) * _single(share.step) + _single(share.low)
    return torch.where(u.to(torch.float32) < p * 2.0**32 - 2.0**31, delta, 0.0)


def norms(base: Tensor, source: Tensor, share: Summand, unit: float) -> tuple[float, float]:
    """Sums of floor(unit * |x - base|): over all elements, and over those a share keeps. Exact for a unit of `unit_of`."""
    b, x = base.reshape(-1), source.reshape(-1)
    compiled = _compiled([base, source], [share])
    spans = _jobs(b.numel(), WeightedSum((share,)), _share_of(b.numel()) if compiled else _CHUNK)
    parts = _each(spans, functools.partial(_norms_c if compiled else _norms_torch, b, x, share, unit))
    return math.fsum(p[0] for p in parts), math.fsum(p[1] for p in parts)


def histogram(base: Tensor, source: Tensor, prefix: int = -1) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[65536] counts of the upper 16 bits of |x - base| as float32; with a prefix, of the lower 16 bits under it."""
    b, x = base.reshape(-1), source.reshape(-1)
    if c_library.fits([base, source]):
        parts = _each(_spans(b.numel(), 1 << 22), functools.partial(_histogram_c, b, x, prefix))
    else:
        parts = [_histogram_torch(b, x, prefix, *span) for span in _spans(b.numel(), 1 << 20)]
    return np.sum(parts, axis=0) if parts else np.zeros(65536, np.int64)


def gram(base: Tensor | None, sources: Sequence[Tensor]) -> list[list[float]]:
    """Dot products of all pairs of x_i - base (of x_i without a base), each tensor one vector, in 64-bit floats.

    Summed piece by piece in a fixed order: the number of threads changes nothing.
    """
    flat, count = [t.reshape(-1) for t in sources], len(sources)
    b = None if base is None else base.reshape(-1)
    work = _gram_c if c_library.fits([base, *sources]) else _gram_torch
    parts = _each(_spans(flat[0].numel(), _PIECE), functools.partial(work, b, flat))
    total = np.sum(parts, axis=0) if parts else np.zeros((count, count))
    return [[float(total[max(i, j), min(i, j)]) for j in range(count)] for i in range(count)]


def largest(base: Tensor, source: Tensor) -> float:
    """max |x - base|, 0 for an empty tensor."""
    b, x = base.reshape(-1), source.reshape(-1)
    tops = [float(difference(b, x, *span).abs().amax()) for span in _spans(b.numel(), 1 << 20)]
    return max(tops, default=0.0)


def unit_of(top: float, n: int) -> float:
    """A power of two by which n magnitudes up to `top` become whole numbers whose sum is below 2**53: exact in any order."""
    if not 0 < top < math.inf:
        return 1.0
    return 2.0 ** max(-126, min(126, 52 - math.ceil(math.log2(n)) - math.frexp(top)[1]))


def each(n: int, size: int, work: Callable[[int, int], T]) -> list[T]:
    """work(start, stop) of every piece of `size` of n elements, in order, on torch's number of threads."""
    return _each(_spans(n, size), work)


def difference(base: Tensor, source: Tensor, start: int, stop: int) -> Tensor:
    """x - base of the elements [start, stop) of two flat tensors, in float32."""
    return source[start:stop].float() - base[start:stop].float()


def _compiled(tensors: Sequence[Tensor | None], shares: Sequence[Summand]) -> bool:
    """Whether C takes these tensors and shares; its ranks have 16 bits."""
    return c_library.fits(tensors) and all(
        share.ranks is None or share.ranks.dtype == torch.uint16 for share in shares
    )


def _sweep_torch(
    base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor, start: int, stop: int
) -> Tensor:
    zero = torch.zeros(stop - start, device=out.device)
    b = zero if base is None else base[start:stop].float()
    ys = [
        keep(x[start:stop].float() - b, share, start) * _single(share.scale) * _single(share.weight)
        for x, share in zip(sources, total.shares, strict=True)
    ]
    result = functools.reduce(torch.add, ys, zero)
    if total.elect:
        sign = torch.where(result >= 0, 1.0, -1.0)
        agreeing = [y * sign for y in ys]
        result = functools.reduce(torch.add, [torch.where(t <= 0, 0.0, t) for t in agreeing], zero) * sign
        if total.divisor is None:
            weights = [
                torch.where(t > 0, _single(share.weight), 0.0)
                for t, share in zip(agreeing, total.shares, strict=True)
            ]
            divisor = functools.reduce(torch.add, weights, zero)
            result = result / torch.where(divisor.abs() < 1e-6, 1.0, divisor)
    if total.divisor is not None and total.divisor != 1:
        result = result / _single(total.divisor)
    result = (b + result * _single(total.factor)).to(out.dtype)
    out[start:stop] = result
    return torch.isfinite(result).all()


def _sweep_c(
    base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor, start: int, stop: int
) -> bool:
    lib, count = c_library.library(), len(sources)
    assert lib is not None
    divide = 2 if total.elect and total.divisor is None else int(total.divisor not in (None, 1))
    how = (int(total.elect), divide, ctypes.c_float(total.divisor or 0.0), ctypes.c_float(total.factor))
    span = (ctypes.c_int64(start), ctypes.c_int64(stop))
    kind, same = (
        _one_kind(total.shares),
        len({t.dtype for t in [*sources, out, *([] if base is None else [base])]}) == 1,
    )
    if kind is not None and same and out.dtype != torch.float16 and count <= _FEW:
        shares = [_of_kind(share, kind) for share in total.shares]
        _, numbers, keys, _ = _encoded(shares, start)
        address, code = c_library.pointer(out)
        bad = lib.sweep_few(
            count,
            int(kind),
            code,
            *span,
            c_library.pointer(base)[0],
            c_library.addresses(sources),
            address,
            numbers,
            keys,
            *how,
        )
    else:
        pointers = (
            *c_library.pointer(base),
            c_library.addresses(sources),
            c_library.type_codes(sources),
            *c_library.pointer(out),
        )
        bad = lib.sweep(count, *span, *pointers, *_encoded(total.shares, start), *how)
    if bad < 0:
        raise MemoryError("no memory for a block of elements")
    return not bad


def _one_kind(shares: Sequence[Summand]) -> MaskKind | None:
    """The kind that all shares can be written as, if there is one that `sweep_few` knows."""
    kinds = {share.kind for share in shares} - {MaskKind.DENSE}
    if len(kinds) > 1 or MaskKind.RANKED in kinds or any(share.outer is not None for share in shares):
        return None
    return kinds.pop() if kinds else MaskKind.DENSE


def _of_kind(share: Summand, kind: MaskKind) -> Summand:
    """The same share with another name for 'all of it', and the bound of a hash inclusive."""
    if share.kind is MaskKind.RANDOM:
        return (
            replace(share, bound=share.bound - 1) if share.bound > -(1 << 31) else replace(share, weight=0.0)
        )
    return (
        replace(share, kind=kind, inner=_ALL, bound=(1 << 31) - 1) if share.kind is MaskKind.DENSE else share
    )


def _encoded(shares: Sequence[Summand], start: int) -> tuple[object, ...]:
    """kinds, numbers, keys and ranks of the shares, as `one_pass.c` takes them."""
    kinds = c_library.integers([s.kind for s in shares])
    numbers = c_library.floats([v for s in shares for v in s.numbers(start)])
    keys = c_library.integers([v for s in shares for v in (*s.key, s.bound)])
    return kinds, numbers, keys, c_library.addresses([s.ranks for s in shares])


def _norms_c(
    base: Tensor, source: Tensor, share: Summand, unit: float, start: int, stop: int
) -> tuple[float, float]:
    lib, totals = c_library.library(), (ctypes.c_double * 2)()
    assert lib is not None
    _, numbers, keys, _ = _encoded([share], start)
    ranks = c_library.pointer(share.ranks)[0]
    lib.norms(
        ctypes.c_int64(start), ctypes.c_int64(stop), *c_library.pointer(base), *c_library.pointer(source),
        int(share.kind), numbers, keys, ranks, ctypes.c_float(unit), totals,
    )  # fmt: skip
    return totals[0], totals[1]


def _norms_torch(
    base: Tensor, source: Tensor, share: Summand, unit: float, start: int, stop: int
) -> tuple[float, float]:
    delta = difference(base, source, start, stop)
    kept = keep(delta, share, start)
    return tuple(float((t.abs() * unit).floor().sum(dtype=torch.float64)) for t in (delta, kept))  # type: ignore[return-value]


def _gram_c(
    base: Tensor | None, sources: Sequence[Tensor], start: int, stop: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    lib, count = c_library.library(), len(sources)
    out = np.zeros((count, count))
    assert lib is not None
    pointers = (*c_library.pointer(base), c_library.addresses(sources), c_library.type_codes(sources))
    if lib.gram(
        count, ctypes.c_int64(start), ctypes.c_int64(stop), *pointers, ctypes.c_void_p(out.ctypes.data)
    ):
        raise MemoryError("no memory for a block of elements")
    return out


def _gram_torch(
    base: Tensor | None, sources: Sequence[Tensor], start: int, stop: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = torch.stack(
        [x[start:stop].float() - (0.0 if base is None else base[start:stop].float()) for x in sources]
    ).double()
    out: np.ndarray[Any, np.dtype[np.float64]] = (rows @ rows.T).cpu().numpy()
    return out


def _histogram_c(
    base: Tensor, source: Tensor, prefix: int, start: int, stop: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    lib, counts = c_library.library(), np.zeros(65536, np.int64)
    assert lib is not None
    address = ctypes.c_void_p(counts.ctypes.data)
    lib.histogram(
        ctypes.c_int64(start),
        ctypes.c_int64(stop),
        *c_library.pointer(base),
        *c_library.pointer(source),
        prefix,
        address,
    )
    return counts


def _histogram_torch(
    base: Tensor, source: Tensor, prefix: int, start: int, stop: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    bits = difference(base, source, start, stop).abs().view(torch.int32)
    bits = bits[(bits >> 16) == prefix] & 0xFFFF if prefix >= 0 else bits >> 16
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = torch.bincount(bits, minlength=65536).cpu().numpy()
    return counts


def _spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(n, start + size)) for start in range(0, n, size))


def _share_of(n: int) -> int:
    """Elements a thread takes, where every thread takes its part of n."""
    return max(_JOB, -(-n // torch.get_num_threads()))


def _jobs(n: int, total: WeightedSum, size: int) -> list[tuple[int, int]]:
    """[start, stop) pieces of n elements, of at most `size`, none of them across a cut."""
    cuts = sorted({0, n, *(cut for share in total.shares for cut in share.cuts() if 0 < cut < n)})
    return [(a + start, a + stop) for a, b in itertools.pairwise(cuts) for start, stop in _spans(b - a, size)]


def _each(
    spans: Iterator[tuple[int, int]] | Sequence[tuple[int, int]], work: Callable[[int, int], T]
) -> list[T]:
    """Runs work(start, stop) on every span, on torch's number of threads."""
    spans, threads = list(spans), torch.get_num_threads()
    if threads == 1 or len(spans) < 2:
        return [work(*span) for span in spans]
    return list(_pool(threads).map(lambda span: work(*span), spans))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")


def _single(x: float) -> float:
    """x rounded to float32."""
    return float(np.float32(x))
