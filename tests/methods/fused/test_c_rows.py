"""A table in one call of the C library has the bits of its rows merged one by one."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.methods import METHODS
from evomerge.methods.fused import MaskKind, Summand, TopK, WeightedSum, c_rows, one_pass
from evomerge.methods.fused.launch_numbers import LaunchNumbers
from evomerge.methods.fused.table_sums import write_sums
from evomerge.methods.fused.tensor_table import TensorTable
from tests.support.launch_cases import SHAPES, bits, models, sums_of, values_of

SUMS = [rule for rule in METHODS.values() if rule.task_vector_sum]
TYPES = [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("sources", [1, 3, 6])
@pytest.mark.parametrize("rule", SUMS, ids=lambda rule: rule.name)
def test_a_table_has_the_bits_of_its_rows(rule, sources: int) -> None:
    densities = (0.6, 0.0, 1.0, 0.311, 0.87, 0.05)[:sources]
    for number, (dtype, out_dtype) in enumerate(zip(TYPES, [*TYPES[1:], TYPES[0]], strict=True)):
        case = models(sources, dtype, seed=number)
        given = {"density": densities} if rule.param("density") else {}
        for out in (dtype, out_dtype):
            values = [values_of(rule, sources, seed=7 + number, **given)] * len(SHAPES)
            sums, wanted = sums_of(rule, case, values, out)
            outs = [torch.full(shape, math.nan, dtype=out) for shape in SHAPES.values()]
            bases = None if rule.task_vector_sum.without_base else case.bases
            ranks = [[summand.ranks for summand in total.summands] for total in sums]
            table = TensorTable(outs, bases, case.sources, ranks=ranks)
            assert c_rows.fits_table(table)
            assert not write_sums(table, LaunchNumbers.of(sums)).any()
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outs, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_thresholds_change_inside_a_row_and_threads_share_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal magnitudes are cut at an index; spans of elements end inside rows."""
    monkeypatch.setattr(c_rows, "_LEAST_SPAN", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    bases = [torch.zeros(n, dtype=dtype) for n in (700, 3000, 1, 1300)]
    sources = [[torch.full_like(base, x) for x in (0.5, -0.25)] for base in bases]
    tops = [(TopK(0.5, 699, 700), TopK(0.25, 10, 11)), (TopK(0.5, 1024, 1), TopK(0.25, 2047, 1))]
    tops += [(TopK(0.5, 0, 1), TopK(0.25, -1, 0)), (TopK(0.5, 650, 1), TopK(0.25, 649, 1))]
    sums = []
    for inner, other in tops:
        bounded = Summand(MaskKind.BAND, 1.0, inner=other, outer=TopK(0.25, 5, 6))
        sums.append(WeightedSum((Summand(MaskKind.BAND, 0.5, inner=inner), bounded)))
    for kept in (sums, [WeightedSum((s.summands[0], s.summands[0])) for s in sums]):
        outs = [torch.full_like(base, math.nan) for base in bases]
        expected = [torch.full_like(base, math.nan) for base in bases]
        for base, row, total, out in zip(bases, sources, kept, expected, strict=True):
            one_pass.write_sum(base, row, total, out)
        assert not write_sums(TensorTable(outs, bases, sources), LaunchNumbers.of(kept)).any()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outs, expected, strict=True))


def test_rows_that_are_not_finite_are_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_rows, "_LEAST_SPAN", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    case = models(3, torch.bfloat16, seed=1)
    case.sources[1][2].view(-1)[0] = math.inf
    case.sources[3][0].view(-1)[-1] = math.nan
    outs = [torch.empty_like(base) for base in case.bases]
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in (0.5, 0.25, 0.25)))
    table = TensorTable(outs, case.bases, case.sources)
    assert write_sums(table, LaunchNumbers.of([total] * table.rows)).tolist() == [0, 1, 0, 1, 0]


def test_more_sources_than_there_is_room_for_are_merged_row_by_row() -> None:
    sources = [[torch.full((3,), 1.0) for _ in range(c_rows.MOST_SOURCES + 1)]]
    table = TensorTable([torch.empty(3)], None, sources)
    assert not c_rows.fits_table(table)
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, 1.0) for _ in sources[0]))
    assert not write_sums(table, LaunchNumbers.of([total])).any()
    assert table.outs[0].tolist() == [c_rows.MOST_SOURCES + 1.0] * 3
