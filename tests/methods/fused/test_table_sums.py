"""Sums over a table of tensors: the bits of merging tensor by tensor, from the numbers of a launch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomerge.methods import METHODS
from evomerge.methods.fused import MagnitudeTables, MaskKind, Summand, TensorPair, WeightedSum
from evomerge.methods.fused.launch_numbers import Division, LaunchNumbers, SumForm
from evomerge.methods.fused.table_sums import write_sums
from evomerge.methods.fused.tensor_table import TensorTable, row_layout
from tests.support.launch_cases import SHAPES, bits, models, sums_of, values_of

FRAMES = [m for m in METHODS.values() if m.task_vector_sum]
RESCALED = [m for m in FRAMES if m.param("rescale")]
every_frame = pytest.mark.parametrize("rule", FRAMES, ids=lambda m: m.name)


def table_of(rule, case, sums, outs):
    bases = None if rule.task_vector_sum.without_base else case.bases
    ranks = [[summand.ranks for summand in total.summands] for total in sums]
    return TensorTable(outs, bases, case.sources, ranks=ranks, is_padded=True)


def same(outs, wanted):
    return all(torch.equal(bits(out), bits(want)) for out, want in zip(outs, wanted, strict=True))


@every_frame
@pytest.mark.parametrize("densities", [(0.6, 0.311, 0.87), (0.0, 0.5, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_a_table_is_merged_as_its_tensors_one_by_one_are(rule, densities):
    case = models(3, torch.bfloat16, seed=1)
    sums, wanted = sums_of(rule, case, [values_of(rule, 3, seed=2, density=densities)] * 5, torch.float32)
    outs = [torch.full(shape, math.nan) for shape in SHAPES.values()]
    flags = write_sums(table_of(rule, case, sums, outs), LaunchNumbers.of(sums))
    assert flags.tolist() == [0] * len(outs)
    assert same(outs, wanted)


@pytest.mark.parametrize("rule", RESCALED, ids=lambda m: m.name)
def test_scales_that_the_launch_finds_are_those_of_the_tables(rule):
    case, tables = models(3, torch.bfloat16, seed=3), MagnitudeTables()
    values = values_of(rule, 3, seed=4, density=(0.37, 1.0, 0.8), rescale=1.0)
    sums, wanted = sums_of(rule, case, [values] * 5, torch.bfloat16)
    plain = [replace(total, summands=tuple(replace(s, scale=1.0) for s in total.summands)) for total in sums]
    assert any(s.scale != 1 for total in sums for s in total.summands)
    pairs = [[TensorPair(base, x) for x in row] for base, row in zip(case.bases, case.sources, strict=True)]
    units = [[tables.unit(pair) for pair in row] for row in pairs]
    outs = [torch.empty(shape, dtype=torch.bfloat16) for shape in SHAPES.values()]
    write_sums(table_of(rule, case, sums, outs), LaunchNumbers.of(plain), torch.tensor(units))
    assert same(outs, wanted)


def test_what_is_not_finite_is_flagged_in_its_row():
    case = models(3, torch.bfloat16, seed=1)
    case.sources[1][2].view(-1)[0] = math.inf
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in (0.5, 0.25, 0.25)))
    outs = [torch.empty_like(base) for base in case.bases]
    flags = write_sums(TensorTable(outs, case.bases, case.sources), LaunchNumbers.of([total] * len(outs)))
    assert flags.tolist() == [0, 1, *[0] * (len(outs) - 2)]


def test_a_form_is_the_narrowest_that_all_sums_have():
    dense, top = Summand(MaskKind.DENSE, 0.5), Summand(MaskKind.RANDOM, 0.5, 2.0, bound=5)
    nothing = Summand(MaskKind.BAND, 0.5)
    assert SumForm.of([WeightedSum((dense, nothing))]) == SumForm(MaskKind.DENSE)
    mixed = [WeightedSum((dense, top), divisor=1.5), WeightedSum((nothing, dense))]
    assert SumForm.of(mixed) == SumForm(MaskKind.RANDOM, division=Division.NUMBER, is_scaled=True)
    assert SumForm.of([WeightedSum((top,), True, None)]).division is Division.AGREEING
    assert SumForm.of([WeightedSum((top, replace(top, kind=MaskKind.RANKED)))]) is None
    with pytest.raises(ValueError, match="one way"):
        LaunchNumbers.of([WeightedSum((dense,), True), WeightedSum((dense,))])


def test_rows_of_one_layout_fit_one_table():
    a, b, whole = torch.zeros(40), torch.zeros(40, dtype=torch.bfloat16), torch.zeros(64)
    assert row_layout(a, None, [a]) == row_layout(a, None, [a + 1])
    assert row_layout(a, None, [a]) != row_layout(a, a, [a])
    assert row_layout(a, a, [a]) != row_layout(a, a, [b])
    assert row_layout(a, a, [a]) != row_layout(whole, whole, [whole])  # 40 is no multiple of 16
    with pytest.raises(ValueError, match="2 layouts"):
        TensorTable([a, b], None, [[a], [b]])
    with pytest.raises(ValueError, match="row 1: a tensor of 64 elements"):
        TensorTable([a, a], None, [[a], [whole]])
    with pytest.raises(ValueError, match="not contiguous"):
        TensorTable([whole.view(8, 8)], None, [[whole.view(8, 8).T]])


def test_blocks_cover_every_row_and_no_other_element():
    sizes = (0, 1, 16, 33, 64)
    outs = [torch.zeros(n) for n in sizes]
    table = TensorTable(outs, None, [[t] for t in outs], is_padded=True)
    blocks = table.blocks(16)
    starts = (np.arange(blocks.count) - blocks.first.numpy()[blocks.row.numpy()]) * 16
    covered = list(zip(blocks.row.tolist(), starts.tolist(), strict=True))
    assert covered == [(row, start) for row, n in enumerate(sizes) for start in range(0, n, 16)]
    assert table.launch_sizes().tolist() == [0, 16, 16, 48, 64]
    assert table.addresses().tolist() == [[t.data_ptr()] * 3 for t in outs]


def test_numbers_that_do_not_fit_a_table_are_refused():
    case = models(2, torch.bfloat16, seed=1)
    outs = [torch.empty_like(base) for base in case.bases]
    table = TensorTable(outs, case.bases, case.sources)
    dense = WeightedSum((Summand(MaskKind.DENSE, 0.5),) * 2)
    with pytest.raises(ValueError, match="do not fit"):
        write_sums(table, LaunchNumbers.of([dense]))
    ranked = WeightedSum((Summand(MaskKind.RANKED, 0.5, low=0.1, step=0.01),) * 2)
    with pytest.raises(ValueError, match="by rank"):
        write_sums(table, LaunchNumbers.of([ranked] * table.rows))
    random = WeightedSum((Summand(MaskKind.RANDOM, 0.5, bound=5),) * 2)
    with pytest.raises(ValueError, match="no bases"):
        write_sums(TensorTable(outs, None, case.sources), LaunchNumbers.of([random] * table.rows))
