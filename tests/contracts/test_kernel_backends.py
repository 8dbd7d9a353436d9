"""What every kernel backend must do: give the torch kernels' bits for all tensors that it says it fits."""

import contextlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from evomerge.merging.merge import mask_key
from evomerge.methods import random_masks
from evomerge.methods.fused import (
    MagnitudeTables,
    MaskKind,
    Summand,
    TensorPair,
    WeightedSum,
    one_pass,
    torch_kernels,
)
from evomerge.methods.fused.exact_products import REST_BITS, unit_exponent
from evomerge.methods.fused.magnitude_tables import GRID, top_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 1025, 70_001)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
every_backend = pytest.mark.parametrize("backend", one_pass.BACKENDS, ids=lambda backend: backend.name)
every_other = pytest.mark.parametrize(
    "backend", [b for b in one_pass.BACKENDS if b is not torch_kernels], ids=lambda backend: backend.name
)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(n, dtype, device, count=3, seed=0):
    """(base, sources), flat: fine-tunes near a base; in 16-bit types many differences have the same size."""
    g = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=g) * 0.05).to(dtype)
    sources = [(base.float() + torch.randn(n, generator=g) * 0.003).to(dtype) for _ in range(count)]
    for x in sources:
        x[: n // 3] = base[: n // 3]  # differences of zero
    return base.to(device), [x.to(device) for x in sources]


def summands(pairs, width):
    """One list of summands for each kind of mask, and one of all kinds."""
    weights, tables = (0.75, -0.25, 1.25), MagnitudeTables()
    keys = [random_masks.split(mask_key(7, "tensor", f"m{i}")) for i in range(3)]
    dense = [Summand(MaskKind.DENSE, w) for w in weights]
    nothing = [Summand(MaskKind.BAND, w) for w in weights]
    largest, band, random, ranked = [], [], [], []
    for w, key, pair in zip(weights, keys, pairs, strict=True):
        inner, outer = (tables.top(pair, top_count(d, pair.n)) for d in (0.6, 0.1))
        largest.append(Summand(MaskKind.BAND, w, 1.7, inner))
        band.append(Summand(MaskKind.BAND, w, 0.9, inner, outer))
        random.append(Summand(MaskKind.RANDOM, w, 2.0, key=key, bound=random_masks.bound(0.3)))
        ranks = torch.empty(
            pair.n, dtype=torch.uint16 if width <= 65536 else torch.int32, device=pair.base.device
        )
        torch_kernels.rank_rows(pair.base, pair.source, width, ranks)
        ranked.append(
            Summand(MaskKind.RANKED, w, 1.1, key=key, ranks=ranks, low=0.2, step=0.5 / max(1, width))
        )
    lowest = [
        Summand(MaskKind.RANDOM, w, key=key, bound=-(1 << 31)) for w, key in zip(weights, keys, strict=True)
    ]
    mixed = [
        [dense[0], largest[1], largest[2]],
        [dense[0], random[1], random[2]],
        [band[0], random[1], ranked[2]],
    ]
    return [dense, nothing, largest, band, random, ranked, lowest, *mixed]


def sums(chosen):
    for elect_sign, divisor, factor in (
        (False, 1.0, 1.0),
        (False, 1.75, 0.7),
        (True, None, 1.3),
        (True, 1.0, 1.0),
    ):
        yield WeightedSum(tuple(chosen), elect_sign, divisor, factor)


def bits(x):
    return x.contiguous().view(torch.uint8).cpu()


def test_every_backend_has_a_name_of_its_own_and_the_last_takes_everything():
    names = [backend.name for backend in one_pass.BACKENDS]
    assert len(set(names)) == len(names)
    strange = torch.zeros(4, 4, dtype=torch.float64).T[1:]
    assert one_pass.BACKENDS[-1].fits([strange, None])
    assert one_pass.backend_for([strange]) is one_pass.BACKENDS[-1]


@every_other
@every_device
@every_dtype
def test_sums_have_the_reference_s_bits_and_say_whether_they_are_finite(backend, device, dtype):
    for n, out_dtype in itertools.product(SIZES, DTYPES):
        base, sources = tensors(n, dtype, device)
        pairs = [TensorPair(base, x) for x in sources]
        for chosen in summands(pairs, n):
            for total in sums(chosen):
                out, want = (torch.full((n,), math.nan, dtype=out_dtype, device=device) for _ in range(2))
                if not backend.fits([base, *sources, out], total.summands):
                    continue
                finite = backend.write_sum(base, sources, total, out)
                assert finite == torch_kernels.write_sum(base, sources, total, want)
                assert torch.equal(bits(out), bits(want)), (n, out_dtype, total)


@every_other
@every_device
def test_sums_without_a_base_of_many_sources_and_of_several_types(backend, device):
    for count in (1, 2, 4, 5):
        base, sources = tensors(3001, torch.float32, device, count)
        sources = [x.to(DTYPES[i % 3]) for i, x in enumerate(sources)]
        total = WeightedSum(tuple(Summand(MaskKind.DENSE, 0.3 + i) for i in range(count)), divisor=1.5)
        for given in (None, base, base.bfloat16()):
            out, want = (torch.empty(3001, dtype=torch.bfloat16, device=device) for _ in range(2))
            if backend.fits([given, *sources, out], total.summands):
                assert backend.write_sum(given, sources, total, out)
                assert torch_kernels.write_sum(given, sources, total, want)
                assert torch.equal(bits(out), bits(want))


@every_backend
@every_device
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_result_that_is_not_finite_is_reported(backend, device, bad):
    for dtype in DTYPES:
        base, sources = tensors(2000, dtype, device)
        sources[1][1234] = bad
        out = torch.empty(2000, dtype=dtype, device=device)
        total = WeightedSum(tuple(Summand(MaskKind.DENSE, 0.5) for _ in sources))
        if backend.fits([base, *sources, out], total.summands):
            assert not backend.write_sum(base, sources, total, out)


@every_other
@every_device
@every_dtype
def test_norms_and_hash_sums_are_the_reference_s(backend, device, dtype):
    for n in SIZES:
        base, (source, *_) = tensors(n, dtype, device)
        unit = one_pass.exact_unit(one_pass.largest_difference(base, source), max(1, n))
        if not backend.fits([base, source]):
            continue
        for chosen in summands([TensorPair(base, source)] * 3, n):
            if backend.fits([base, source], chosen[:1]):
                got = backend.l1_norms(base, source, chosen[0], unit)
                assert got == torch_kernels.l1_norms(base, source, chosen[0], unit)
        key = random_masks.split(mask_key(5, "a", "b"))
        want = torch_kernels.hash_sums(base, source, key, unit, GRID)
        assert np.array_equal(backend.hash_sums(base, source, key, unit, GRID), want)


def by_sorting(base, source, counts, unit):
    """(bits of thresholds, lasts, sums) from one stable sort; a loop over the k."""
    size = (source.float() - base.float()).abs()
    order = torch.from_numpy(np.argsort(-size.view(torch.int32).cpu().numpy(), kind="stable"))
    sums = (size * unit).floor().double()[order].cumsum(0)
    last = order[[k - 1 for k in counts]]
    return bits(size[last]).tolist(), last.tolist(), sums[[k - 1 for k in counts]].tolist()


@every_backend
@every_device
@every_dtype
@pytest.mark.parametrize("kind", ["near", "equal", "zero", "one bucket", "infinite"])
def test_tables_of_the_largest_elements_are_those_of_a_sort(backend, device, dtype, kind):
    for n, threads in itertools.product(SIZES[1:], (1, 3)):
        base, (source, *_) = tensors(n, dtype, device, seed=n)
        if kind == "equal":  # one magnitude, of both signs
            base, source = torch.zeros_like(base), torch.where(source > 0, 0.5, -0.5).to(dtype)
        elif kind == "zero":
            source = base.clone()
        elif kind == "one bucket" and dtype == torch.float32:  # magnitudes that differ in their last bits
            base, source = torch.zeros_like(base), 1 + torch.randint(0, 40, (n,), device=device) * 2.0**-23
        elif kind == "infinite":
            source[n // 2 :: 97] = math.inf
        unit = one_pass.exact_unit(one_pass.largest_difference(base, source), n)
        counts = sorted({top_count(j / GRID, n) for j in range(1, GRID)} | {n, min(2, n)})
        if backend.fits([base, source]):
            with torch_threads(threads):
                thresholds, lasts = backend.top_k_table(base, source, counts)
                sums = backend.top_k_sums(base, source, unit, counts, thresholds, lasts)
                alone = backend.top_k_table(base, source, counts[len(counts) // 2 :][:1])
            want = by_sorting(base, source, counts, unit)
            assert thresholds.dtype == np.float32
            assert (bits(torch.from_numpy(thresholds)).tolist(), lasts.tolist()) == want[:2]
            assert kind == "infinite" or sums.tolist() == want[2]
            assert alone[1][0] == lasts[len(counts) // 2]


@contextlib.contextmanager
def torch_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_other
@every_device
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), (4, 1), (7, 33), (150, 50), (3, 4000), (2, 65_535), (2, 65_536), (2, 70_000), (0, 5)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["near", "equal", "zero", "wide", "infinite"])
def test_ranks_are_the_reference_s(backend, device, rows, width, kind):
    for dtype in DTYPES:
        base, (source, *_) = tensors(rows * width, dtype, device)
        if kind == "equal":
            base, source = torch.zeros_like(base), torch.where(source > 0, 0.5, -0.5).to(dtype)
        elif kind == "zero":
            source = base.clone()
        elif kind == "wide":  # from the smallest to nearly the largest numbers
            powers = torch.arange(rows * width, device=device) % 23 - 12
            base, source = torch.zeros_like(base), (source * 2.0**powers).to(dtype)
        elif kind == "infinite":
            source[::37] = math.inf
        rank_dtype = torch.uint16 if width <= 65536 else torch.int32
        out, want = (torch.zeros(rows * width, dtype=rank_dtype, device=device) for _ in range(2))
        if backend.fits([base, source]):
            tops = [
                backend.rank_rows(base, source, width, out),
                torch_kernels.rank_rows(base, source, width, want),
                float((source.float() - base.float()).abs().amax()) if base.numel() else 0.0,
            ]
            assert len(set(tops)) == 1, tops
            assert torch.equal(out.int(), want.int())


def vectors(base, sources):
    """x_i - base in float32; x_i without a base."""
    return [x.float() if base is None else x.float() - base.float() for x in sources]


def rounded(number, unit_exponent):
    """A fraction as a whole number of 2**-unit_exponent, to nearest, ties to even."""
    return round(number * Fraction(2) ** unit_exponent)


def products_by_fractions(a, b, exponent):
    """The definition of `exact_products`, element by element."""
    total = 0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y)
        whole = rounded(exact, exponent)
        rest = rounded(exact - Fraction(whole) / Fraction(2) ** exponent, exponent + REST_BITS)
        total += (whole << REST_BITS) + rest
    return total


PAIRS = [(i, k) for i in range(3) for k in range(i + 1)]


@every_backend
@every_device
@every_dtype
def test_sums_of_products_are_those_of_fractions(backend, device, dtype):
    for n, based, scale in itertools.product((1, 7, 1030), (True, False), (1.0, 2.0**-12)):
        base, sources = tensors(n, dtype, device)
        base, sources = (base * scale).to(dtype), [(x * scale).to(dtype) for x in sources]
        if not backend.fits([base, *sources]):
            continue
        wanted = vectors(base if based else None, sources)
        tops = backend.largest(base if based else None, sources)
        assert tops == [float(x.abs().max()) for x in wanted]
        exponents = [unit_exponent(n, tops[i] or 1.0, tops[k] or 1.0) for i, k in PAIRS]
        got = backend.product_sums(base if based else None, sources, PAIRS, exponents)
        for (i, k), exponent, total in zip(PAIRS, exponents, got, strict=True):
            assert total == products_by_fractions(wanted[i], wanted[k], exponent)


@every_other
@every_device
@every_dtype
def test_sums_of_products_are_the_reference_s(backend, device, dtype):
    for n, based in itertools.product(SIZES, (True, False)):
        base, sources = tensors(n, dtype, device)
        if backend.fits([base, *sources]):
            given = (base if based else None, sources)
            assert backend.largest(*given) == torch_kernels.largest(*given)
            exponents = [44 - i for i in range(len(PAIRS))]
            assert backend.product_sums(*given, PAIRS, exponents) == torch_kernels.product_sums(
                *given, PAIRS, exponents
            )


@every_backend
@every_device
def test_sums_of_products_do_not_overflow(backend, device):
    """The largest sums there are: 2**21 equal products, each with half a unit left over by rounding."""
    n = 1 << 21
    exponent = unit_exponent(n, 1.9, 1.9)
    assert exponent == 38
    x = torch.full((n,), float(np.float32(1.9)), device=device)
    left = Fraction(float(x[0])) ** 2
    if backend.fits([x]):
        [total] = backend.product_sums(None, [x], [(0, 0)], [exponent])
        whole = rounded(left, exponent)
        rest = rounded(left - Fraction(whole) / 2**exponent, exponent + REST_BITS)
        assert total == n * ((whole << REST_BITS) + rest)


@every_backend
@every_device
def test_the_largest_magnitude_of_a_vector_that_is_not_finite_is_not(backend, device):
    base, sources = tensors(2000, torch.float32, device)
    sources[0][1999], sources[1][3] = math.nan, -math.inf
    if backend.fits([base, *sources]):
        nan, infinite, finite = backend.largest(base, sources)
        assert math.isnan(nan)
        assert infinite == math.inf
        assert math.isfinite(finite)


@every_backend
@every_device
@every_dtype
def test_projections_are_those_of_a_loop_in_float64(backend, device, dtype):
    for n, based in itertools.product(SIZES, (True, False)):
        base, (gradient, *sources) = tensors(n, dtype, device)
        if not backend.fits([base, gradient, *sources]):
            continue
        origin = base.float() if based else torch.zeros_like(base, dtype=torch.float32)
        got = backend.projections(gradient, base if based else None, sources)
        want = [float((gradient.double() * (x.float() - origin).double()).sum()) for x in sources]
        assert got.tolist() == pytest.approx(want, rel=1e-10, abs=1e-12)


@every_backend
def test_the_number_of_threads_changes_no_bit(backend):
    base, sources = tensors(600_000, torch.bfloat16, "cpu")
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in (0.1, 0.2, 0.3)), True, None)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = torch.empty(600_000)
            if backend.fits([base, *sources, out], total.summands):
                backend.write_sum(base, sources, total, out)
                results.append((bits(out), backend.product_sums(base, sources, PAIRS, [40] * len(PAIRS))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in itertools.pairwise(results))
