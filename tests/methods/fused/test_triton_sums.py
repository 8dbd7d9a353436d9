"""Sums over a table in Triton's interpreter: the bits of the C path, for every method.

In a process whose Triton interprets: `test_triton_kernels.py` runs this file in one, by hand it is
`TRITON_INTERPRET=1 python -m pytest tests/methods/fused/test_triton_sums.py`.
"""

import math
import os
from dataclasses import replace

import pytest
import torch

from evomerge.methods import METHODS, random_masks
from evomerge.methods.fused import (
    MagnitudeTables,
    MaskKind,
    Summand,
    TensorPair,
    TopK,
    WeightedSum,
    c_kernels,
    triton_kernels,
)
from evomerge.methods.fused.launch_numbers import LaunchNumbers
from evomerge.methods.fused.table_sums import write_sums
from evomerge.methods.fused.tensor_table import TensorTable
from tests.support.launch_cases import bits, models, padded, sums_of, values_of

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
FRAMES = [m for m in METHODS.values() if m.task_vector_sum]
SHAPES = {"odd": (7, 131), "two blocks": (35, 62), "one": (1,)}
ONE = {"q": (12, 64)}
CASES = [  # sources, type of the models, type of the result, whether tensors are padded
    (3, BF16, BF16, True),
    (1, F32, F32, True),
    (8, BF16, BF16, True),
    (2, F16, F16, False),
    (4, F32, BF16, True),
    (5, BF16, F32, False),
    (6, F16, F32, True),
    (7, F32, F16, False),
]


def launched(rule, case, sums, out_dtype, is_padded=True):
    """(outputs of one launch, its flags)."""
    shapes = [base.shape for base in case.bases]
    outs = padded(shapes, out_dtype, fill=7.0)
    bases = None if rule is not None and rule.task_vector_sum.without_base else case.bases
    ranks = [[summand.ranks for summand in total.summands] for total in sums]
    table = TensorTable(outs, bases, case.sources, ranks=ranks, is_padded=is_padded)
    assert triton_kernels.fits_table(table)
    return outs, write_sums(table, LaunchNumbers.of(sums))


def check(rule, count, dtype, out_dtype, seed, is_padded=True, shapes=SHAPES, **given):
    """One launch with other values for each row."""
    case = models(count, dtype, seed, shapes)
    flags = {p.name: float((seed + i) % 2) for i, p in enumerate(rule.params) if p.flag}
    values = [values_of(rule, count, seed + row, **(flags | given)) for row in range(len(shapes))]
    sums, wanted = sums_of(rule, case, values, out_dtype, seed)
    outs, not_finite = launched(rule, case, sums, out_dtype, is_padded)
    for out, want in zip(outs, wanted, strict=True):
        assert torch.equal(bits(out), bits(want)), (rule.name, seed, int((out != want).sum()))
    assert not_finite.tolist() == [int(not torch.isfinite(want).all()) for want in wanted]


def parameters():
    """Three cases for each method, all cases for some method; the others belong to the sweep."""
    for m, rule in enumerate(FRAMES):
        chosen = {(m + shift) % len(CASES) for shift in (0, 3, 6)}
        for c, case in enumerate(CASES):
            marks = () if c in chosen else pytest.mark.sweep
            yield pytest.param(rule, *case, marks=marks, id=f"{rule.name}-{case[0]}-{c}")


every_case = pytest.mark.parametrize(("rule", "count", "dtype", "out_dtype", "is_padded"), [*parameters()])


@every_case
def test_the_kernel_has_the_c_path_s_bits(rule, count, dtype, out_dtype, is_padded):
    check(rule, count, dtype, out_dtype, 10 * count, is_padded)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(4))
@every_case
def test_the_kernel_has_the_c_path_s_bits_for_more_values(rule, count, dtype, out_dtype, is_padded, seed):
    check(rule, count, dtype, out_dtype, 1000 + seed, is_padded)


@pytest.mark.parametrize("rule", [m for m in FRAMES if m.param("density")], ids=lambda m: m.name)
def test_densities_of_nothing_and_of_everything(rule):
    case = models(3, BF16, 5, {"a": (9, 64), "b": (9, 64), "c": (9, 64)})
    densities = ((0.0, 0.5, 1.0), (1.0, 1.0, 1.0), (0.001, 0.999, 0.0))
    values = [values_of(rule, 3, 7, density=d, normalize=1.0, rescale=1.0) for d in densities]
    sums, wanted = sums_of(rule, case, values, BF16)
    outs, flags = launched(rule, case, sums, BF16)
    assert all(torch.equal(bits(out), bits(want)) for out, want in zip(outs, wanted, strict=True))
    assert flags.tolist() == [0, 0, 0]


def test_sums_are_divided_exactly():
    """By the sum of weights, and by the weights that agree at an element."""
    check(METHODS["linear"], 3, F32, F32, 3, shapes=ONE, normalize=1.0, weight=(0.5, 0.4, 0.3))
    check(METHODS["ties"], 3, F32, F32, 4, shapes=ONE, normalize=1.0, weight=(0.7, 0.3, 0.9))


def test_equal_magnitudes_are_cut_at_their_index():
    """All differences equal: which elements stay is decided by their index alone, inside a block."""
    case = models(3, BF16, 0, {"a": (3000,), "b": (70, 33)})
    for base, sources in zip(case.bases, case.sources, strict=True):
        base.zero_()
        for i, x in enumerate(sources):
            x.fill_(0.5 * (i + 1))
    rule = METHODS["ties"]
    given = {"weight": (1.0, -0.3, 0.7), "density": (0.311, 0.5, 0.87), "normalize": 1.0}
    sums, wanted = sums_of(rule, case, [values_of(rule, 3, 0, **given)] * 2, BF16)
    outs, flags = launched(rule, case, sums, BF16)
    assert all(torch.equal(bits(out), bits(want)) for out, want in zip(outs, wanted, strict=True))
    assert flags.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_what_is_not_finite_is_flagged_in_its_row_and_subnormals_are_kept(dtype):
    case = models(3, dtype, 3, {str(i): (5, 40) for i in range(5)})
    tiny = torch.finfo(dtype).tiny
    for tensor in (case.bases[0], *case.sources[0]):
        tensor.mul_(tiny)
    case.sources[1][1][3, 5] = math.inf
    case.sources[2][2].fill_(torch.finfo(dtype).max)
    case.sources[3][0][4, 1] = math.nan
    given = {"weight": (1.5, 1.0, 2.0), "density": (1.0,) * 3, "normalize": 0.0, "lambda": 1.0}
    rule = METHODS["ties"]
    sums, wanted = sums_of(rule, case, [values_of(rule, 3, 0, **given)] * 5, dtype)
    outs, flags = launched(rule, case, sums, dtype)
    assert flags.tolist() == [0, 1, 1, 1, 0]
    assert bool((wanted[0].float().abs() < tiny).any())
    for out, want in zip(outs, wanted, strict=True):
        is_finite = torch.isfinite(want)
        assert torch.equal(out[is_finite], want[is_finite])
        assert not torch.isfinite(out[~is_finite]).any()


@pytest.mark.parametrize("name", ["linear", "dare_ties", "ties"])
def test_roundings_halfway_between_two_numbers_and_sums_of_exactly_zero(name):
    rule, g = METHODS[name], torch.Generator().manual_seed(1)
    case = models(3, BF16, 0, {"a": (16, 48), "b": (999,)})
    for base, sources in zip(case.bases, case.sources, strict=True):
        base.copy_(torch.randint(-256, 256, base.shape, generator=g) / 256)
        step = torch.randint(-3, 4, base.shape, generator=g) / 128
        for x, sign in zip(sources, (1, -1, 0.5), strict=True):
            x.copy_(base.float() + sign * step)
    given = {"weight": (0.25, 0.25, 0.125), "density": (1.0, 1.0, 0.5), "normalize": 0.0, "rescale": 0.0}
    values = [values_of(rule, 3, 0, **given, **{"lambda": 1.0})] * 2
    sums, wanted = sums_of(rule, case, values, BF16)
    _, fine = sums_of(rule, case, values, F32)
    assert sum(int(((x.view(torch.int32) & 0xFFFF) == 0x8000).sum()) for x in fine) > 20
    outs, _ = launched(rule, case, sums, BF16)
    assert all(torch.equal(bits(out), bits(want)) for out, want in zip(outs, wanted, strict=True))


def test_sources_of_several_types_and_rows_at_any_address():
    case = models(3, F32, 8, {"a": (300,), "b": (41,)})
    for sources in case.sources:
        sources[1:] = [sources[1].bfloat16(), sources[2].half()]
    weights = (0.3, 1.3, -0.4)
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in weights), divisor=1.7, factor=0.9)
    bases = [base[1:] for base in case.bases]
    sources = [[x[1:] for x in row] for row in case.sources]
    outs, wanted = ([torch.empty(len(b), dtype=BF16) for b in bases] for _ in range(2))
    table = TensorTable(outs, bases, sources)
    assert not table.is_aligned
    assert write_sums(table, LaunchNumbers.of([total] * 2)).tolist() == [0, 0]
    for base, row, want, out in zip(bases, sources, wanted, outs, strict=True):
        assert c_kernels.write_sum(base, row, total, want)
        assert torch.equal(bits(out), bits(want))


MASKS = {
    "dense": Summand(MaskKind.DENSE, 1.0),
    "band": Summand(MaskKind.BAND, 1.0, inner=TopK(0.001, 200, 0), outer=TopK(0.003, 400, 0)),
    "random": Summand(
        MaskKind.RANDOM, 1.0, key=random_masks.split(77 << 33 | 5), bound=random_masks.bound(0.3)
    ),
    "least bound": Summand(MaskKind.RANDOM, 1.0, key=(7, 9), bound=-(1 << 31)),
    "nothing": Summand(MaskKind.BAND, 1.0),
}


@pytest.mark.parametrize("mask", MASKS)
def test_norms_and_single_sums_are_those_of_the_c_path(mask):
    case = models(1, BF16, 9, {"a": (1313,)})
    base, source, summand = case.bases[0], case.sources[0][0], MASKS[mask]
    unit = MagnitudeTables().unit(TensorPair(base, source))
    assert triton_kernels.fits([base, source], [summand])
    found = triton_kernels.l1_norms(base, source, summand, unit)
    assert found == c_kernels.l1_norms(base, source, summand, unit)
    out, want = torch.empty(1313), torch.empty(1313)
    total = WeightedSum((replace(summand, weight=0.7, scale=1.3),))
    assert triton_kernels.write_sum(base, [source], total, out)
    c_kernels.write_sum(base, [source], total, want)
    assert torch.equal(bits(out), bits(want))


@pytest.mark.parametrize("name", ["dare_ties", "della", "breadcrumbs"])
def test_scales_are_found_on_the_device(name):
    rule, tables = METHODS[name], MagnitudeTables()
    case = models(3, BF16, 21, {"a": (33, 64), "b": (7, 31)})
    given = {"density": (0.37, 1.0, 0.8123), "rescale": 1.0, "normalize": 1.0}
    sums, wanted = sums_of(rule, case, [values_of(rule, 3, 22 + row, **given) for row in range(2)], BF16)
    plain = [replace(t, summands=tuple(replace(s, scale=1.0) for s in t.summands)) for t in sums]
    units = [
        [tables.unit(TensorPair(base, x)) for x in row]
        for base, row in zip(case.bases, case.sources, strict=True)
    ]
    outs = padded([base.shape for base in case.bases], BF16)
    ranks = [[s.ranks for s in total.summands] for total in sums]
    table = TensorTable(outs, case.bases, case.sources, ranks=ranks, is_padded=True)
    assert not write_sums(table, LaunchNumbers.of(plain), torch.tensor(units)).any()
    assert all(torch.equal(bits(out), bits(want)) for out, want in zip(outs, wanted, strict=True))


def test_a_small_sum_is_launched_before_a_device_is_trusted():
    assert triton_kernels.gives_the_reference_s_bits(torch.device("cpu"))


def test_an_empty_tensor_and_what_does_not_fit():
    empty = torch.zeros(0)
    total = WeightedSum((Summand(MaskKind.DENSE, 1.0),))
    assert triton_kernels.write_sum(empty, [empty], total, torch.zeros(0))
    assert triton_kernels.l1_norms(empty, empty, total.summands[0], 1.0) == (0.0, 0.0)
    assert not triton_kernels.fits([torch.zeros(4, dtype=torch.float64)])
    assert not triton_kernels.fits([torch.zeros(4, 4).T])
    assert not triton_kernels.fits([empty], [MASKS["band"], MASKS["random"]])
    long_ranks = Summand(MaskKind.RANKED, 1.0, ranks=torch.zeros(3, dtype=torch.int32))
    assert not triton_kernels.fits([torch.zeros(3)], [long_ranks])
