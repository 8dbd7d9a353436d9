"""Where a method differs from mergekit on purpose: its result with `mergekit_compatible`, ours without."""

import math

import pytest
import torch

from evomerge.errors import CandidateError
from tests.support.merge_references import merge, models, random


def test_nuslerp_mixes_a_vector_of_no_length_linearly():
    x, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    torch.testing.assert_close(merge("nuslerp", [x, zero], weight=(0.75, 0.25)), 0.75 * x)
    torch.testing.assert_close(
        merge("nuslerp", [x, zero], weight=(0.75, 0.25), mergekit_compatible=True),
        math.sin(0.75 * math.pi / 2) * x,
    )
    short = x * 1e-9  # mergekit takes its length for 1e-7
    torch.testing.assert_close(
        merge("nuslerp", [short, short.flip(0)], weight=(1.0, 1.0)).norm(), short.norm()
    )
    assert (
        merge("nuslerp", [short, short.flip(0)], weight=(1.0, 1.0), mergekit_compatible=True).norm()
        > 1.3 * short.norm()
    )


def test_nuslerp_crosses_between_opposite_models_in_a_straight_line():
    x = random((64,), 0).float()
    for noise in (0.0, 1e-7, 1e-5):
        out = merge("nuslerp", [x, -x + noise * random((64,), 1).float()], weight=(0.25, 0.75))
        torch.testing.assert_close(out, -0.5 * x, rtol=1e-4, atol=1e-4)


def test_multislerp_of_directions_that_cancel_is_the_weighted_sum():
    x, y = random((6, 5), 0).float(), random((6, 5), 1).float()
    given = {"weight": (0.5, 0.5, 0.0)}
    torch.testing.assert_close(merge("multislerp", [x, -2 * x, y], **given), -0.5 * x)
    with pytest.raises(CandidateError):
        merge("multislerp", [x, -2 * x, y], mergekit_compatible=True, **given)
    equal = merge("multislerp", [x, y], weight=(1.0, 1.0))
    for weight in ((0.0, 0.0), (1.0, -1.0)):
        assert torch.equal(merge("multislerp", [x, y], weight=weight), equal)
        assert not merge("multislerp", [x, y], weight=weight, mergekit_compatible=True).isfinite().any()


def test_multislerp_keeps_the_mean_length_at_a_large_eps():
    x, y = random((300,), 0), random((300,), 1)
    length = (x.norm() + y.norm()) / 2
    for eps in (1e-8, 0.5):
        assert merge("multislerp", [x, y], weight=(1.0, 1.0), eps=eps).norm().item() == pytest.approx(
            length.item()
        )
    assert (
        merge("multislerp", [x, y], weight=(1.0, 1.0), eps=0.5, mergekit_compatible=True).norm().item()
        < 0.9 * length.item()
    )


def test_karcher_knows_no_tensor_too_short():
    x = random((5, 5), 0, 1e-8).float()
    torch.testing.assert_close(merge("karcher", [x, x, x]), x, rtol=1e-5, atol=0)
    assert not merge("karcher", [x, x, x], mergekit_compatible=True).any()


def test_karcher_of_opposite_models_does_not_depend_on_their_order():
    x, y = random((50,), 0), random((50,), 1)
    torch.testing.assert_close(merge("karcher", [x, -3 * x]), -x)
    torch.testing.assert_close(merge("karcher", [-3 * x, x]), -x)
    torch.testing.assert_close(merge("karcher", [x, -x, y]), merge("karcher", [y, x, -x]))


def test_karcher_is_where_the_logarithms_of_the_models_cancel():
    units = [random((40,), i) / random((40,), i).norm() for i in range(4)]
    mean = merge("karcher", [u * (i + 1) for i, u in enumerate(units)], max_iter=100.0, tol=1e-12)
    assert mean.norm().item() == pytest.approx(2.5)
    mean = mean / 2.5
    angles = [torch.acos(u @ mean) for u in units]
    assert sum(a / a.sin() * (u - a.cos() * mean) for a, u in zip(angles, units, strict=True)).norm() < 1e-10


def test_model_stock_measures_angles_of_small_changes():
    base, step = random((400,), 0).double(), random((3, 400), 1)
    for scale in (1.0, 1e-6):
        deltas = [scale * (step[0] + 0.5 * s) for s in step[1:]]
        cos = torch.nn.functional.cosine_similarity(*deltas, dim=0).item()
        moved = merge("model_stock", [base + d for d in deltas], base) - base
        torch.testing.assert_close(
            moved, 2 * cos / (1 + cos) * (deltas[0] + deltas[1]) / 2, rtol=1e-6, atol=1e-15
        )
    assert (
        merge("model_stock", [base + d for d in deltas], base, mergekit_compatible=True) - base
    ).norm() < 0.01 * moved.norm()


def test_model_stock_is_the_base_beyond_a_right_angle():
    x = torch.tensor([1.0, 0.1])
    tensors, base = [x, torch.tensor([-1.0, 0.1])], torch.zeros(2)
    assert torch.equal(merge("model_stock", tensors, base), base)
    assert merge("model_stock", tensors, base, mergekit_compatible=True)[1] < -4, (
        "mergekit goes the other way, further than any model"
    )


def test_sce_selects_one_entry_at_least_and_all_where_none_varies():
    tensors, base = models("far", (6, 5), 3, torch.float32)
    assert (merge("sce", tensors, base, select_topk=1e-6) != base).sum() == 1
    assert torch.equal(merge("sce", tensors, base, select_topk=1e-6, mergekit_compatible=True), base)
    one = [tensors[0]]
    torch.testing.assert_close(merge("sce", one, base, select_topk=0.5), one[0])
    assert torch.equal(merge("sce", one, base, select_topk=0.5, mergekit_compatible=True), base)
    for shape in ((), (1,), (4, 4)):
        tensors, base = models("far", shape, 3, torch.float32)
        assert torch.equal(merge("sce", tensors, base, select_topk=0.0), base)


def test_sce_weighs_small_changes_as_it_does_large_ones():
    base = torch.zeros(400, dtype=torch.float64)
    big, small = random((400,), 0).abs() + 0.1, 0.1 * random((400,), 1).abs() + 0.01
    large = merge("sce", [big, small], base)
    torch.testing.assert_close(merge("sce", [big * 1e-4, small * 1e-4], base), large * 1e-4)
    torch.testing.assert_close(
        merge("sce", [big * 1e-4, small * 1e-4], base, mergekit_compatible=True), (big + small) / 2 * 1e-4
    )


def test_nearswap_takes_what_is_nearer_than_any_threshold():
    base = torch.zeros(3, dtype=torch.float64)
    x = torch.tensor([1e-8, -4e-8, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        merge("nearswap", [x], base, t=2e-8),
        torch.tensor([1e-8, -2e-8, 2e-8], dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    assert merge("nearswap", [x], base, t=2e-8, mergekit_compatible=True)[0] == pytest.approx(0.02 * 1e-8)


def test_arcee_fusion_reads_every_entry_of_a_large_tensor():
    """A sample would miss the one entry that decides, and differ from one call to the next."""
    [x], base = models("far", (1100, 1000), 1, torch.float32)
    for mergekit_compatible in (False, True):
        torch.manual_seed(1)
        first, state = (
            merge("arcee_fusion", [x], base, mergekit_compatible=mergekit_compatible),
            torch.get_rng_state(),
        )
        torch.manual_seed(2)
        assert torch.equal(merge("arcee_fusion", [x], base, mergekit_compatible=mergekit_compatible), first)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
    p, q = (v.double().log_softmax(-1) for v in (x, base))
    importance = (x - base).double().abs() * (p.exp() * (p - q)).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    q1, median, q3 = (ordered[int(f * (x.numel() - 1))] for f in (0.25, 0.5, 0.75))
    chosen = merge("arcee_fusion", [x], base) == x
    assert (chosen != (importance >= median + 1.5 * (q3 - q1))).sum() <= 2  # at the threshold, by rounding


def test_arcee_fusion_sees_the_divergence_of_models_that_hardly_differ():
    base = random((64, 500), 0).float()
    x = base + random((64, 500), 1, 2e-5).float()
    wide = merge("arcee_fusion", [x.double()], base.double()) == x.double()
    narrow, theirs = (
        merge("arcee_fusion", [x], base) == x,
        merge("arcee_fusion", [x], base, mergekit_compatible=True) == x,
    )
    assert (wide != narrow).double().mean() < 0.001
    assert (wide != theirs).double().mean() > 0.05, "in mergekit rounding decides"


def test_ramplus_has_a_value_at_epsilon_zero():
    tensors, base = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])], torch.zeros(3)
    out = merge("ramplus_tl", tensors, base, epsilon=0.0)
    torch.testing.assert_close(out, torch.tensor([1.0 + 0.1 * 0.2, 0.0, 3.0]))
    torch.testing.assert_close(merge("ram", tensors, base, epsilon=0.0), torch.tensor([1.0, 0.0, 3.0]))
