"""Tables of a search in Triton's interpreter: the numbers of the C path and of fractions.

In a process whose Triton interprets, see `test_triton_sums.py`.
"""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from evomerge.methods import random_masks
from evomerge.methods.fused import (
    MagnitudeTables,
    MaskKind,
    Summand,
    TensorPair,
    c_kernels,
    device_tables,
    one_pass,
    pair_measures,
    torch_kernels,
    triton_kernels,
)
from evomerge.methods.fused.exact_products import REST_BITS, unit_exponent
from evomerge.methods.fused.magnitude_tables import GRID, top_count
from evomerge.methods.fused.tensor_table import TensorTable
from tests.support.launch_cases import models

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
SHAPES = {"norm": (33,), "one": (1,), "odd": (7, 131), "more": (40, 64)}
every_dtype = pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)


def pairs_of(dtype, seed, shapes=SHAPES):
    """(a table of one row for each pair of base and source, the units of the pairs)."""
    case = models(1, dtype, seed, shapes)
    table = TensorTable(case.bases, case.bases, case.sources, is_padded=True)
    tops = device_tables.largest(table)[:, 0].tolist()
    units = [one_pass.exact_unit(top, b.numel()) for top, b in zip(tops, case.bases, strict=True)]
    return case, table, torch.tensor(units)


def known(backend, base, source, unit, counts):
    """k -> (threshold, index of the last element at it, norm)."""
    thresholds, lasts = backend.top_k_table(base, source, counts)
    norms = backend.top_k_sums(base, source, unit, counts, thresholds, lasts)
    return dict(
        zip(counts, zip(thresholds.tolist(), lasts.tolist(), norms.tolist(), strict=True), strict=True)
    )


@every_dtype
def test_thresholds_and_norms_of_many_counts_are_the_c_path_s(dtype):
    case, table, units = pairs_of(dtype, 1)
    counts = np.array([[top_count(j / 40, b.numel()) for j in range(1, 41)] for b in case.bases])
    thresholds, lasts = device_tables.top_k(table, counts)
    norms = device_tables.top_k_norms(table, thresholds, lasts, units)
    for row, (base, sources) in enumerate(zip(case.bases, case.sources, strict=True)):
        flat = (base.view(-1), sources[0].view(-1))
        want = known(c_kernels, *flat, float(units[row]), sorted({*counts[row].tolist()}))
        for i, k in enumerate(counts[row].tolist()):
            found = (float(thresholds[row, i]), int(lasts[row, i]), float(norms[row, i]))
            assert found == want[k], (row, k)
        assert int(norms[row, -1]) == int(want[base.numel()][2])


def test_a_table_of_every_density_is_the_c_path_s():
    case, _, units = pairs_of(BF16, 4, {"a": (70, 65)})
    base, source = case.bases[0].view(-1), case.sources[0][0].view(-1)
    counts = sorted({top_count(j / GRID, base.numel()) for j in range(1, GRID)})
    given = (base, source, float(units[0]), counts)
    assert known(triton_kernels, *given) == known(c_kernels, *given)


def test_pairs_of_several_types_are_measured_side_by_side():
    cases = [models(1, dtype, 6, {"a": (33,), "b": (12, 40)}) for dtype in (BF16, F32)]
    pairs = [TensorPair(case.bases[i], case.sources[i][0]) for i in range(2) for case in cases]
    counts = [[top_count(j / 9, pair.n) for j in range(1, 9)] for pair in pairs]
    found = pair_measures.measured(pairs, counts)
    for pair, ks, measure in zip(pairs, counts, found, strict=True):
        flat = (pair.base.view(-1), pair.source.view(-1))
        assert pair_measures.measures(pair)
        assert measure.unit == MagnitudeTables().unit(pair)
        everything = Summand(MaskKind.DENSE, 1.0)
        assert measure.whole == c_kernels.l1_norms(*flat, everything, measure.unit)[0]
        size = (flat[1].float() - flat[0].float()).abs().numpy()
        order = np.argsort(-size, kind="stable")
        whole = np.floor(size[order] * np.float32(measure.unit)).astype(np.float64)
        assert measure.thresholds.tolist() == [size[order[k - 1]] for k in ks]
        assert measure.lasts.tolist() == [order[k - 1] for k in ks]
        assert measure.norms.tolist() == [whole[:k].sum() for k in ks]


def test_equal_magnitudes_and_unchanged_tensors():
    base = torch.zeros(3000, dtype=BF16)
    source = torch.full((3000,), 0.5, dtype=BF16)
    source[1000:] = -0.5
    table = TensorTable([base] * 2, [base] * 2, [[source], [base]])
    thresholds, lasts = device_tables.top_k(table, np.array([[1, 700, 2999], [1, 700, 3000]]))
    assert thresholds.tolist() == [[0.5] * 3, [0.0] * 3]
    assert lasts.tolist() == [[0, 699, 2998], [0, 699, 2999]]


def test_most_of_the_weights_are_unchanged():
    g = torch.Generator().manual_seed(3)
    base = torch.randn(9000, generator=g).bfloat16()
    changed = torch.rand(9000, generator=g) < 0.2
    source = torch.where(changed, base.float() + torch.randn(9000, generator=g) * 0.01, base).bfloat16()
    counts = [1, 10, 100, 1000, 1500, 2000, 2001, 3000, 4500, 6000, 7777, 8999, 9000]
    given = (base, source, 1024.0, counts)
    assert known(triton_kernels, *given) == known(torch_kernels, *given)


@every_dtype
def test_hash_sums_are_the_c_path_s(dtype):
    case, table, units = pairs_of(dtype, 2)
    keys = [random_masks.split(7919 * (row + 1) * (1 << 33) + row) for row in range(table.rows)]
    found = device_tables.hash_sums(table, keys, units, GRID)
    for row, (base, sources) in enumerate(zip(case.bases, case.sources, strict=True)):
        flat = (base.view(-1), sources[0].view(-1))
        want = c_kernels.hash_sums(*flat, keys[row], float(units[row]), GRID)
        assert np.array_equal(found[row].numpy(), want)
    base, source = case.bases[2].view(-1), case.sources[2][0].view(-1)
    one = triton_kernels.hash_sums(base, source, keys[2], float(units[2]), GRID)
    assert np.array_equal(one, found[2].numpy())


@pytest.mark.parametrize("is_based", [True, False])
@every_dtype
def test_dot_products_are_those_of_fractions(dtype, is_based):
    case = models(2, dtype, 8, {"a": (33,), "b": (70, 31)})
    bases = case.bases if is_based else None
    pairs = [(0, 0), (1, 0), (1, 1)]
    table = TensorTable(case.bases, bases, case.sources, is_padded=True)
    tops = device_tables.largest(table).tolist()
    exponents = [
        [unit_exponent(base.numel(), tops[row][i], tops[row][k]) for i, k in pairs]
        for row, base in enumerate(case.bases)
    ]
    found = device_tables.product_sums(table, pairs, exponents)
    for row, (base, sources) in enumerate(zip(case.bases, case.sources, strict=True)):
        flat = (base.view(-1) if is_based else None, [x.view(-1) for x in sources])
        assert tops[row] == torch_kernels.largest(*flat) == triton_kernels.largest(*flat)
        assert found[row] == c_kernels.product_sums(*flat, pairs, exponents[row])
        assert found[row] == triton_kernels.product_sums(*flat, pairs, exponents[row])
    origin = case.bases[0].float() if is_based else 0.0
    a, b = ((x.float() - origin).tolist() for x in case.sources[0])
    exact = sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))
    got = Fraction(found[0][1]) / Fraction(2) ** (exponents[0][1] + REST_BITS)
    assert abs(got - exact) <= Fraction(33, 2) / Fraction(2) ** (exponents[0][1] + REST_BITS)


def test_the_largest_magnitude_of_what_is_not_finite():
    base, source = torch.zeros(300), torch.ones(300)
    sources = [source.clone() for _ in range(3)]
    sources[0][299], sources[1][3] = math.nan, -math.inf
    nan, infinite, finite = triton_kernels.largest(base, sources)
    assert math.isnan(nan)
    assert (infinite, finite) == (math.inf, 1.0)
    assert triton_kernels.largest(None, [torch.zeros(0)]) == [0.0]


@pytest.mark.sweep
def test_tables_of_a_search_are_measured_side_by_side_and_are_those_of_the_cpu():
    case = models(1, BF16, 7, {"a": (33,), "b": (520, 130)})
    pairs = [TensorPair(b, x[0], i) for i, (b, x) in enumerate(zip(case.bases, case.sources, strict=True))]
    here, there = MagnitudeTables(build=True), MagnitudeTables(build=True)
    here.prepare(pairs)
    large = pairs[1]  # the other is too small for a table
    want = there.top_table(large)
    found = here.top_table(large)
    assert found.counts.tolist() == want.counts.tolist()
    assert found.thresholds.tolist() == want.thresholds.tolist()
    assert found.lasts.tolist() == want.lasts.tolist()
    assert here.top_sums(large).tolist() == there.top_sums(large).tolist()
    assert (here.unit(large), here.whole_norm(large)) == (there.unit(large), there.whole_norm(large))
