"""One-pass merges against the methods' own kernels in 64-bit floats; the same bits however they run."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from evomerge.merging.merge import mask_key
from evomerge.methods import METHODS, random_masks
from evomerge.methods.fused import (
    MergeInputs,
    c_library,
    combine_by_dot_products,
    magnitude_tables,
    merge_tensor,
    one_pass,
    torch_kernels,
    weighted_sum,
)
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.weighted_sum import TensorPair

FRAMES = [m for m in METHODS.values() if m.task_vector_sum]
SPARSE = [m for m in FRAMES if m.param("density")]
SHAPES = [(), (1,), (1, 7), (5, 1), (0,), (3, 0), (4, 3, 5), (257, 130)]
every_frame = pytest.mark.parametrize("rule", FRAMES, ids=lambda m: m.name)
every_sparse = pytest.mark.parametrize("rule", SPARSE, ids=lambda m: m.name)


def models(shape, n=3, dtype=torch.bfloat16, seed=0):
    """(sources, base): fine-tunes near a base; in 16-bit types many differences have the same size."""
    g = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=g) * 0.05).to(dtype)
    return [(base.float() + torch.randn(shape, generator=g) * 0.003).to(dtype) for _ in range(n)], base


def numbers(rule, n, density=(0.5, 0.123, 0.777), **given):
    values = {p.name: (p.default,) * n if p.per == "model" else p.default for p in rule.params}
    values["weight"] = (0.75, -0.25, 1.25)[:n]  # exact in every float type: a sum of zero is zero in all
    values |= {"density": density[:n]} if rule.param("density") else {}
    return values | {k: v for k, v in given.items() if rule.param(k)}


def run(rule, sources, base, values, *, tables=None, out_dtype=torch.float32, keys=None, ids=True):
    keys = keys or [mask_key(7, "t", f"m{i}") for i in range(len(sources))]
    base = None if rule.task_vector_sum.without_base else base
    ids = [("t", i) for i in range(len(sources))] if ids else []
    out = torch.full_like(sources[0], math.nan, dtype=out_dtype)
    inputs = MergeInputs(sources, base, keys, ids, "base")
    finite = merge_tensor(rule.task_vector_sum, inputs, values, out, tables or MagnitudeTables())
    assert finite == bool(torch.isfinite(out).all())
    return out


def in_float64(rule, sources, base, values, keys=None):
    keys = keys or [mask_key(7, "t", f"m{i}") for i in range(len(sources))]
    base = None if rule.task_vector_sum.without_base else base.double()
    return rule.kernel([x.double() for x in sources], base, values, keys)


@every_frame
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "flags",
    [{}, {"normalize": 1.0}, {"normalize": 0.0, "rescale": 0.0}, {"rescale": 1.0, "lambda": 1.3}],
    ids=str,
)
def test_it_is_the_kernel_in_float64(rule, shape, flags):
    for n, dtype in itertools.product((1, 2, 3), (torch.float32, torch.bfloat16)):
        sources, base = models(shape, n, dtype, seed=n)
        values = numbers(rule, n, **flags)
        torch.testing.assert_close(
            run(rule, sources, base, values).double(),
            in_float64(rule, sources, base, values),
            rtol=3e-5,
            atol=1e-7,
        )


@every_frame
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_chunks_and_the_compiled_version_change_no_bit(rule, dtype, monkeypatch):
    if c_library.library() is None:
        pytest.skip("no C compiler")
    sources, base = models((100, 1111), dtype=dtype)
    values = numbers(rule, 3, rescale=1.0, normalize=1.0)
    results = {}
    before = torch.get_num_threads()
    try:
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            for compiled, threads, chunk in [
                (True, 1, 1 << 18),
                (True, 3, 10_000),
                (False, 1, 1 << 16),
                (False, 2, 9_999),
            ]:
                torch.set_num_threads(threads)
                with monkeypatch.context() as m:
                    m.setattr(c_library, "_LEAST_SPAN", chunk)
                    m.setattr(torch_kernels, "_CHUNK", chunk)
                    if not compiled:
                        m.setattr(one_pass, "BACKENDS", (torch_kernels,))
                    results.setdefault(out_dtype, []).append(
                        run(rule, sources, base, values, out_dtype=out_dtype)
                    )
    finally:
        torch.set_num_threads(before)
    for same in results.values():
        for other in same[1:]:
            assert torch.equal(same[0].view(torch.uint8), other.view(torch.uint8))


@every_sparse
@pytest.mark.parametrize("density", [(1.0, 0.5, 0.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_a_model_kept_whole_beside_masked_ones_has_the_bits_of_torch(rule, density, monkeypatch):
    if c_library.library() is None:
        pytest.skip("no C compiler")
    for dtype in (torch.float32, torch.bfloat16):
        sources, base = models((30, 111), dtype=dtype)
        values = numbers(rule, 3, density)
        compiled = run(rule, sources, base, values, out_dtype=dtype)
        with monkeypatch.context() as m:
            m.setattr(one_pass, "BACKENDS", (torch_kernels,))
            assert torch.equal(run(rule, sources, base, values, out_dtype=dtype), compiled)


@every_sparse
@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_tables_change_no_bit(rule, rescale):
    sources, base = models((300, 1111))
    tables = MagnitudeTables(build=True, ranks_bytes=1 << 30)
    for density in [(0.5, 0.123, 0.777), (0.1234567, 0.9999, 0.001), (0.0, 1.0, 1e-7), (0.5, 0.5, 0.5)]:
        values = numbers(rule, 3, density, rescale=rescale)
        plain = run(rule, sources, base, values)
        for _ in range(2):
            assert torch.equal(run(rule, sources, base, values, tables=tables), plain)


@every_sparse
def test_a_nan_in_a_parent_is_not_lost_where_it_is_kept(rule):
    sources, base = models((4, 100))
    sources[0][2, 3] = math.nan
    out = run(rule, sources, base, numbers(rule, 3, (1.0, 0.5, 0.5)))
    assert not torch.isfinite(out[2, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_level_is_the_first_of_a_stable_sort(dtype):
    for seed, n in enumerate((1, 2, 100, 5_000, 70_000)):
        (source,), base = models((n,), 1, dtype, seed)
        size = (source.float() - base.float()).abs()
        order = size.argsort(descending=True, stable=True)
        tables = MagnitudeTables(build=True)
        for k in sorted(
            {
                1,
                n,
                max(1, n // 3),
                max(1, n - 1),
                *(magnitude_tables.top_count(j / 1000, n) for j in (1, 37, 500, 999)),
            }
        ):
            want = torch.zeros(n, dtype=torch.bool)
            want[order[:k]] = True
            for top in (
                MagnitudeTables().top(TensorPair(base, source), k),
                tables.top(TensorPair(base, source, "id"), k),
            ):
                index = torch.arange(n)
                got = (size > top.threshold) | ((size == top.threshold) & (index <= top.last))
                assert torch.equal(got, want)


def test_norms_are_the_same_in_any_order_and_right():
    (source,), base = models((100_000,), 1, torch.float32)
    share = weighted_sum.Summand(
        weighted_sum.MaskKind.RANDOM,
        1.0,
        key=random_masks.split(mask_key(1, "a", "b")),
        bound=random_masks.bound(0.3),
    )
    unit = one_pass.exact_unit(one_pass.largest_difference(base, source), 100_000)
    total, kept = one_pass.l1_norms(base, source, share, unit)
    permuted = torch.randperm(100_000, generator=torch.Generator().manual_seed(0))
    dense = weighted_sum.Summand(weighted_sum.MaskKind.DENSE, 1.0)
    assert (
        one_pass.l1_norms(base[permuted].contiguous(), source[permuted].contiguous(), dense, unit)[0] == total
    )
    exact = (source.double() - base.double()).abs()
    mask = torch_kernels.masked(torch.ones(100_000), share, 0).bool()
    assert total / unit == pytest.approx(float(exact.sum()), rel=1e-6)
    assert kept / unit == pytest.approx(float(exact[mask].sum()), rel=1e-6)


# ---- hashing: against plain integers, and as random bits


def hash_reference(index, key):
    """Unsigned 32-bit arithmetic in Python's integers."""
    word = 2**32 - 1
    x = index & word
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
    x = ((x ^ (x >> 15)) * 0x846CA68B) & word
    x ^= x >> 16
    u = ((x ^ (key & word)) * (((key >> 32) & word) | 1)) & word
    return u - 2**32 if u >= 2**31 else u


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
def test_hashes_are_those_of_plain_integers(key):
    for start in (0, 12_345, 2**31 - 5, 2**32 - 3):
        got = random_masks.hashed(random_masks.mixed(start, start + 9), random_masks.split(key))
        assert got.tolist() == [hash_reference(start + j, key) for j in range(9)]


def test_masks_are_independent_of_position_and_of_each_other():
    n, d = 200_000, 0.3
    masks = []
    for i in range(12):
        u = random_masks.hashed(
            random_masks.mixed(0, n), random_masks.split(mask_key(3, "tensor", f"m{i}"))
        ).long()
        masks.append((u < random_masks.bound(d)).double())
    sigma = math.sqrt(d * (1 - d) / n)
    for a in masks:
        assert abs(float(a.mean()) - d) < 5 * sigma
        for lag in (1, 2, 7, 64, 1024):
            both = float((a[lag:] * a[:-lag]).mean())
            assert abs(both - d * d) < 6 * math.sqrt(d * d * (1 - d * d) / n)
        rows = a.reshape(-1, 1000).mean(dim=1)
        assert float(rows.std()) == pytest.approx(math.sqrt(d * (1 - d) / 1000), rel=0.25)
    for a, b in itertools.combinations(masks, 2):
        assert abs(float((a * b).mean()) - d * d) < 6 * math.sqrt(d * d * (1 - d * d) / n)


def test_masks_nest():
    u = random_masks.hashed(random_masks.mixed(0, 10_000), random_masks.split(mask_key(0, "t", "m"))).long()
    kept = [u < random_masks.bound(d) for d in (0.0, 0.1, 0.100001, 0.5, 0.999, 1.0)]
    assert not kept[0].any()
    assert kept[-1].all()
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(kept))


def test_without_a_compiler_it_says_so_and_works(monkeypatch):
    monkeypatch.setenv("EVOMERGE_NATIVE", "0")
    c_library.library.cache_clear()
    try:
        assert c_library.library() is None
        sources, base = models((40, 30))
        rule = METHODS["ties"]
        assert torch.isfinite(run(rule, sources, base, numbers(rule, 3))).all()
    finally:
        c_library.library.cache_clear()


# ---- what C does for the tables, against torch


@pytest.mark.parametrize("shape", [(5,), (7, 33), (3, 4, 50), (2, 70_000)], ids=str)
def test_ranks_in_c_are_those_of_a_stable_sort(shape, monkeypatch):
    (source,), base = models(shape, 1)
    found = magnitude_tables.MagnitudeTables().ranks(TensorPair(base, source))
    monkeypatch.setattr(one_pass, "BACKENDS", (torch_kernels,))
    assert torch.equal(found.int(), magnitude_tables.MagnitudeTables().ranks(TensorPair(base, source)).int())
    size = (source.float() - base.float()).abs().reshape(-1, shape[-1])
    for row, ranks in zip(size, found.int().reshape(-1, shape[-1]), strict=True):
        assert ranks[row.argsort(stable=True)].tolist() == list(range(shape[-1]))


def test_hash_tables_in_c_are_those_of_torch(monkeypatch):
    (source,), base = models((90_001,), 1)
    pair, key = TensorPair(base, source), random_masks.split(mask_key(5, "a", "b"))
    unit = MagnitudeTables().unit(pair)
    sums, bounds = magnitude_tables._hash_table(pair, key, unit)
    monkeypatch.setattr(one_pass, "BACKENDS", (torch_kernels,))
    again, same = magnitude_tables._hash_table(pair, key, unit)
    assert np.array_equal(sums, again)
    assert np.array_equal(bounds, same)


def test_rows_longer_than_a_short_number_counts_are_ranked_right():
    """DELLA's ranks of rows beyond 65536 do not fit 16 bits; the C kernel once read them as if they did."""
    rule = METHODS["della_linear"]
    sources, base = models((2, 70_000), 1, torch.float32)
    values = numbers(rule, 1, (0.5,), rescale=0.0)
    torch.testing.assert_close(
        run(rule, sources, base, values).double(),
        in_float64(rule, sources, base, values),
        rtol=3e-5,
        atol=1e-7,
    )


# ---- methods by angles


@pytest.mark.parametrize("rule", [m for m in METHODS.values() if m.coefficients], ids=lambda m: m.name)
@pytest.mark.parametrize("based", [True, False])
def test_a_combination_by_dot_products_is_the_kernel_in_float64(rule, based, monkeypatch):
    if (not based and rule.needs_base) or (based and not (rule.needs_base or rule.takes_base)):
        pytest.skip("the method has no such form")
    for n in range(rule.models[0], min(rule.models[1], 3) + 1):
        for shape in [(300, 257), (7,), ()]:
            sources, base = models(shape, n, torch.float32, seed=n)
            sources = [
                x + 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
                for i, x in enumerate(sources)
            ]
            base = base if based else None
            values = numbers(rule, n) if rule.param("weight") else {p.name: p.default for p in rule.params}
            want = rule.kernel(
                [x.double() for x in sources], None if base is None else base.double(), values, [0] * n
            )
            results = []
            for compiled in (True, False):
                with monkeypatch.context() as m:
                    if not compiled:
                        m.setattr(one_pass, "BACKENDS", (torch_kernels,))
                    out = torch.empty(shape)
                    inputs = MergeInputs(sources, base)
                    assert combine_by_dot_products(rule, inputs, values, out, MagnitudeTables())
                    results.append(out)
            torch.testing.assert_close(results[0].double(), want, rtol=2e-5, atol=1e-6)
            assert torch.equal(results[1], results[0])


ANGLES = [m for m in METHODS.values() if m.coefficients]


def combined(rule, sources, base, tables):
    values = numbers(rule, len(sources)) if rule.param("weight") else {p.name: p.default for p in rule.params}
    out = torch.empty_like(sources[0], dtype=torch.float32)
    inputs = MergeInputs(sources, base, source_ids=[("m", i) for i in range(len(sources))], base_id="base")
    assert combine_by_dot_products(rule, inputs, values, out, tables)
    return out


@pytest.mark.parametrize("rule", ANGLES, ids=lambda m: m.name)
def test_dot_products_are_measured_once_for_all_candidates(rule, monkeypatch):
    n = min(rule.models[1], 3) if rule.name != "nuslerp" else 2
    sources, base = models((40, 33), n)
    base = base if rule.needs_base else None
    tables = MagnitudeTables()
    first = combined(rule, sources, base, tables)
    monkeypatch.setattr(one_pass, "dot_products", None)
    assert torch.equal(combined(rule, sources, base, tables), first)


def test_a_model_that_is_new_is_measured_with_the_others_alone(monkeypatch):
    sources, _ = models((40, 33), 4)
    tables = MagnitudeTables()
    before = tables.dot_products(None, sources[:3], ["a", "b", "c"])
    measured, asked = one_pass.dot_products, []
    monkeypatch.setattr(
        one_pass, "dot_products", lambda base, x, pairs: asked.extend(pairs) or measured(base, x, pairs)
    )
    after = tables.dot_products(None, [sources[2], sources[3], sources[0]], ["c", "d", "a"])
    assert asked == [(1, 0), (1, 1), (2, 1)]
    assert after[2][0] == before[0][2]
    assert after == tables.dot_products(None, [sources[2], sources[3], sources[0]], [None] * 3)


def test_dot_products_are_the_exact_ones_rounded_once():
    """Of bfloat16 models nothing is lost but far below the last bit: Fraction gives the same float64."""
    for n in (1, 33, 2000):
        sources, base = models((n,), 3, seed=n)
        for given in (None, base):
            exact = [[Fraction(v) for v in (x.float() - (0 if given is None else base.float())).tolist()]
                     for x in sources]  # fmt: skip
            pairs = [(i, k) for i in range(3) for k in range(i + 1)]
            got = one_pass.dot_products(given, sources, pairs)
            for (i, k), found in zip(pairs, got, strict=True):
                assert found == float(sum(a * b for a, b in zip(exact[i], exact[k], strict=True)))


def test_dot_products_are_the_same_in_any_order():
    sources, base = models((70_001,), 2, torch.float32)
    pairs = [(0, 0), (1, 0), (1, 1)]
    order = torch.randperm(70_001, generator=torch.Generator().manual_seed(0))
    shuffled = one_pass.dot_products(base[order], [x[order] for x in sources], pairs)
    assert shuffled == one_pass.dot_products(base, sources, pairs)


def test_dot_products_of_zero_and_of_bad_vectors():
    zero, bad, x = torch.zeros(9), torch.full((9,), math.inf), torch.ones(9)
    found = one_pass.dot_products(None, [zero, bad, x], [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)])
    assert [found[i] for i in (0, 3, 5)] == [0.0, 0.0, 9.0]
    assert all(math.isnan(found[i]) for i in (1, 2, 4))


@pytest.mark.parametrize("rule", ANGLES, ids=lambda m: m.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_parent_that_is_not_finite_is_seen_by_methods_by_angles(rule, bad):
    n = min(rule.models[1], 3) if rule.name != "nuslerp" else 2
    sources, base = models((40, 33), n)
    sources[0][3, 3] = bad
    out = torch.empty((40, 33))
    values = numbers(rule, n) if rule.param("weight") else {p.name: p.default for p in rule.params}
    inputs = MergeInputs(sources, base if rule.needs_base else None)
    assert combine_by_dot_products(rule, inputs, values, out, MagnitudeTables()) is False
