"""Every merge method against the formulas of `merge_references`; promises of single methods; masks.

What all methods have in common is in tests/contracts/test_methods.py.
"""

import itertools
import math
import random as draw
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.merging.merge import mask_key
from evomerge.methods import METHODS, Method, Param, dare, method, random_masks
from evomerge.methods.fused import MagnitudeTables, MergeInputs, merge_tensor
from tests.support.merge_references import (
    OF_TASK_VECTORS,
    REFERENCES,
    corners,
    hash_reference,
    lacking,
    reference,
    slerp,
)

WEIGHTS, DENSITIES = (0.75, 0.5, 1.25, -0.25), (0.5, 0.25, 0.75, 0.4)
BASED = {f"{m.name} with base": replace(m, needs_base=True) for m in METHODS.values() if m.takes_base}
CASES = METHODS | BASED
NEED_BASE = [m for m in CASES.values() if m.needs_base]
SPARSE = [m for m in METHODS.values() if m.param("density")]

every_method = pytest.mark.parametrize("rule", CASES.values(), ids=CASES)
every_method_and_count = pytest.mark.parametrize(
    ("rule", "n"),
    [
        pytest.param(m, n, id=f"{name}-{n}")
        for name, m in CASES.items()
        for n in range(m.models[0], min(4, m.models[1]) + 1)
    ],
)


def random(shape, seed, scale=1.0, dtype=torch.float32):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    ).to(dtype)


def example(rule: Method, shape=(6, 5), n=None, dtype=torch.float32, seed=0, spread=0.5):
    """(tensors, base, keys) of fine-tunes near a base."""
    n = min(3, rule.models[1]) if n is None else n
    base = random(shape, seed, dtype=dtype)
    tensors = [base + random(shape, seed + i + 1, spread, dtype) for i in range(n)]
    return (
        tensors,
        base if rule.needs_base else None,
        [mask_key(seed, "tensor", f"model {i}") for i in range(n)],
    )


MATTER = {
    **{name: {"gamma": (0.1, 0.3, 0.6, 0.2)} for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: {"epsilon": (0.2, 0.1, 0.4, 0.0)} for name in ("della", "della_linear")},
    "nuslerp": {"nuslerp_flatten": 0.0},
    "multislerp": {"eps": 0.5},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.4},
    "ramplus_tl": {"epsilon": 0.4, "r": 0.3},
}


def numbers(rule: Method, n: int, **given):
    """Values that make every parameter matter: unequal weights whose sum is not one, densities below one."""
    values = {p.name: (p.default,) * n if p.per == "model" else p.default for p in rule.params}
    values |= {"weight": WEIGHTS[:n]} if rule.param("weight") else {}
    values |= {"density": DENSITIES[:n]} if rule.param("density") else {}
    values |= MATTER.get(rule.name, {}) | given
    return {k: v[:n] if isinstance(v, tuple) else v for k, v in values.items()}


# ---- against the formulas, element by element


def test_every_method_has_a_reference_here():
    for name in METHODS:
        assert name in REFERENCES or name in OF_TASK_VECTORS, lacking(name)
    assert {*REFERENCES, *OF_TASK_VECTORS} == {*METHODS}
    for name, rule in METHODS.items():
        tensors, base, keys = example(rule)
        assert reference(name, tensors, base, numbers(rule, len(tensors)), keys).shape == tensors[0].shape


@every_method_and_count
@pytest.mark.parametrize(
    "flags",
    [{}, {"normalize": 1.0}, {"normalize": 0.0}, {"rescale": 1.0}, {"rescale": 0.0, "normalize": 1.0}],
    ids=str,
)
def test_float64_is_the_reference(rule, n, flags):
    for seed, shape in enumerate([(40, 7), (31,), (2, 3, 5)]):
        tensors, base, keys = example(rule, shape, n, torch.float64, seed)
        values = numbers(rule, n, **{k: v for k, v in flags.items() if rule.param(k)})
        torch.testing.assert_close(
            rule.kernel(tensors, base, values, keys),
            reference(rule.name, tensors, base, values, keys),
            rtol=1e-12,
            atol=1e-14,
        )


@every_method_and_count
def test_float32_is_the_reference_up_to_rounding(rule, n):
    tensors, base, keys = example(rule, (24, 17), n)
    every = list(corners(rule, n))
    for corner in every if len(every) < 40 else draw.Random(0).sample(every, 40):
        values = numbers(rule, n, **corner)
        got, want = (
            rule.kernel(tensors, base, values, keys),
            reference(rule.name, tensors, base, values, keys),
        )
        torch.testing.assert_close(
            got.double(), want, rtol=2e-5, atol=2e-5, msg=lambda m, v=values: f"{v}: {m}"
        )


DYADIC = st.integers(-8, 8).map(lambda i: i / 8)  # exact in float32, with many ties and zeros


@st.composite
def task_vector_case(draw):
    n, size = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    rows = draw(st.lists(st.lists(DYADIC, min_size=size, max_size=size), min_size=n + 1, max_size=n + 1))
    values = {
        "weight": tuple(draw(DYADIC) * 2 for _ in range(n)),
        "density": tuple(draw(st.integers(0, 16)) / 16 for _ in range(n)),
        "gamma": tuple(draw(st.integers(0, 8)) / 16 for _ in range(n)),
        "epsilon": tuple(draw(st.integers(0, 8)) / 16 for _ in range(n)),
        "lambda": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "normalize": float(draw(st.booleans())),
        "rescale": 0.0,  # rescaled sums that cancel are a matter of rounding
    }
    keys = [draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(n)]
    return rows, values, keys


@pytest.mark.parametrize("rule", [m for m in NEED_BASE if m.param("lambda")], ids=lambda m: m.name)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=task_vector_case())
def test_ties_between_signs_and_sizes_are_broken_as_the_reference_breaks_them(rule, case):
    rows, values, keys = case
    base, *tensors = [torch.tensor(row) for row in rows]
    values = {k: v for k, v in values.items() if rule.param(k)}
    got = rule.kernel(tensors, base, values, keys)
    torch.testing.assert_close(
        got.double(), reference(rule.name, tensors, base, values, keys), rtol=1e-5, atol=1e-6
    )


# ---- of single methods


@every_method
def test_strided_inputs_merge_as_their_copies_do(rule):
    tensors, base, keys = example(rule, (6, 8))
    values = numbers(rule, len(tensors))
    strided = [x.T.contiguous().T for x in tensors], None if base is None else base.T.contiguous().T
    assert not strided[0][0].is_contiguous()
    torch.testing.assert_close(rule.kernel(*strided, values, keys), rule.kernel(tensors, base, values, keys))


@every_method
def test_the_global_generator_is_neither_read_nor_moved(rule):
    tensors, base, keys = example(rule)
    values = numbers(rule, len(tensors))
    torch.manual_seed(1)
    first, state = rule.kernel(tensors, base, values, keys), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, rule.kernel(tensors, base, values, keys))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_average_of_equal_parents_is_the_parent():
    x = random((9, 4), 5)
    for weights in [(1.0, 1.0, 1.0), (0.2, 0.3, 0.9), (5.0, -1.0, 0.0)]:
        torch.testing.assert_close(
            METHODS["linear"].kernel([x] * 3, None, {"weight": weights, "normalize": 1.0}, [0] * 3), x
        )


def test_a_normalized_average_of_zero_weight_is_not_finite():
    tensors, _, keys = example(METHODS["linear"])
    for weights in [(0.0, 0.0, 0.0), (1.0, 0.0, -1.0)]:
        assert not torch.isfinite(
            METHODS["linear"].kernel(tensors, None, {"weight": weights, "normalize": 1.0}, keys)
        ).any()


@pytest.mark.parametrize("rule", SPARSE, ids=lambda m: m.name)
def test_at_density_one_every_entry_is_kept_and_nothing_is_rescaled(rule):
    tensors, base, keys = example(rule, (16, 16))
    dense = numbers(rule, 3, density=(1.0, 1.0, 1.0))
    assert torch.equal(
        rule.kernel(tensors, base, dense | {"rescale": 1.0}, keys),
        rule.kernel(tensors, base, dense | {"rescale": 0.0}, keys),
    )
    assert torch.equal(
        rule.kernel(tensors, base, dense, keys), rule.kernel(tensors, base, dense, keys[::-1])
    ), "no mask is needed at density 1"


@pytest.mark.parametrize("rule", SPARSE, ids=lambda m: m.name)
def test_at_density_zero_the_base_is_left(rule):
    tensors, base, keys = example(rule, (16, 16))
    assert torch.equal(rule.kernel(tensors, base, numbers(rule, 3, density=(0.0,) * 3), keys), base)


def test_task_vectors_of_hardly_any_norm_are_not_rescaled():
    """Below 1e-7 the ratio of norms says nothing; from there on it counts."""
    rule, base = METHODS["dare_linear"], torch.zeros(64, dtype=torch.float64)
    for size, rescaled in ((1e-4, True), (1e-8, True), (1e-10, False)):
        delta = torch.full_like(base, size)
        kept = rule.kernel([delta], base, numbers(rule, 1, density=(0.5,), weight=(1.0,), rescale=1.0), [7])
        plain = rule.kernel([delta], base, numbers(rule, 1, density=(0.5,), weight=(1.0,), rescale=0.0), [7])
        assert torch.equal(kept, plain) is not rescaled


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.5, 0.9999])
def test_ties_keeps_one_entry_at_least(density):
    rule = METHODS["ties"]
    for size in (1, 2, 3, 100, 1000):
        base, x = torch.zeros(size), random((size,), size)
        out = rule.kernel([x], base, numbers(rule, 1, density=(density,), weight=(1.0,)), [0])
        assert (out != 0).sum().item() == max(1, int(density * size))
        assert out.abs().max() == x.abs().max()


def test_slerp_keeps_the_length_of_unit_vectors_and_moves_at_an_even_pace():
    a, b = (torch.nn.functional.normalize(random((300,), i, dtype=torch.float64), dim=0) for i in range(2))
    points = [METHODS["slerp"].kernel([b], a, {"t": i / 10}, [0]) for i in range(11)]
    assert torch.equal(points[0], a)
    torch.testing.assert_close(points[10], b)
    angles = [torch.acos((p @ q).clamp(-1, 1)).item() for p, q in itertools.pairwise(points)]
    assert angles == pytest.approx([angles[0]] * 10)
    assert [p.norm().item() for p in points] == pytest.approx([1.0] * 11)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.035, 0.05, 0.2, -0.2, 3.0])
def test_slerp_is_the_reference_on_both_sides_of_nearly_parallel(noise):
    a = random((2000,), 0, dtype=torch.float64)
    for b in (
        a + noise * random((2000,), 1, dtype=torch.float64),
        -a + noise * random((2000,), 1, dtype=torch.float64),
    ):
        want = torch.tensor(slerp([b.tolist()], a.tolist(), {"t": 0.3}, (2000,)), dtype=torch.float64)
        torch.testing.assert_close(
            METHODS["slerp"].kernel([b], a, {"t": 0.3}, [0]), want, rtol=1e-9, atol=1e-12
        )


def test_a_layer_scaled_by_zero_is_zero():
    x = random((4, 4), 0)
    assert torch.equal(METHODS["passthrough"].kernel([x], None, {"scale": (0.0,)}, [0]), torch.zeros(4, 4))
    assert torch.equal(METHODS["passthrough"].kernel([x], None, {"scale": (1.0,)}, [0]), x)


def test_slerp_of_a_tensor_larger_than_a_chunk_is_one_arc():
    a, b = (random(((1 << 20) + 77,), i) for i in range(2))
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
    want = (torch.sin(0.75 * angle) * a.double() + torch.sin(0.25 * angle) * b.double()) / torch.sin(angle)
    torch.testing.assert_close(
        METHODS["slerp"].kernel([b], a, {"t": 0.25}, [0]).double(), want, rtol=1e-5, atol=1e-5
    )


# ---- declarations


def test_switches_default_as_in_mergekit():
    default = {
        "linear": {"normalize": 1.0},
        "slerp": {},
        "task_arithmetic": {"normalize": 0.0},
        "ties": {"normalize": 1.0, "rescale": 0.0},
        "dare_linear": {"normalize": 0.0, "rescale": 1.0},
        "dare_ties": {"normalize": 0.0, "rescale": 1.0},
        "breadcrumbs": {"normalize": 0.0, "rescale": 0.0},
        "breadcrumbs_ties": {"normalize": 0.0, "rescale": 0.0},
        "della": {"normalize": 1.0, "rescale": 1.0},
        "della_linear": {"normalize": 0.0, "rescale": 1.0},
        "passthrough": {},
        "nuslerp": {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0},
        "multislerp": {"normalize_weights": 1.0},
        "model_stock": {"filter_wise": 0.0},
        **{name: {} for name in ("karcher", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion")},
    }
    assert {
        name: {p.name: p.default for p in rule.params if p.flag} for name, rule in METHODS.items()
    } == default
    assert {
        p.default
        for rule in METHODS.values()
        for p in rule.params
        if p.name in ("lambda", "density", "scale")
    } == {1.0}


@pytest.mark.parametrize("rule", METHODS.values(), ids=METHODS)
def test_declarations_are_in_order(rule):
    assert METHODS[rule.name] is rule
    assert method(rule.name) is rule
    names = [p.name for p in rule.params]
    assert len(set(names)) == len(names)
    assert 1 <= rule.models[0] <= rule.models[1]
    assert rule.summary
    assert rule.paper
    for p in rule.params:
        assert p.hard_low <= p.low < p.high <= p.hard_high
        assert p.hard_low <= p.default <= p.hard_high
        assert [round(v, p.digits) for v in (p.low, p.high, p.default)] == [p.low, p.high, p.default], (
            "a search can propose these"
        )
        assert rule.param(p.name) is p
    assert rule.param("no such parameter") is None


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown merge method 'tie'\. Did you mean 'ties'"):
        method("tie")


def test_a_parameter_refuses_what_its_method_has_no_meaning_for():
    density = Param("density", 0.1, 1.0, 1.0, hard_low=0.0, hard_high=1.0)
    assert [density.check(v, "layer 0") for v in (0.0, 0.05, 1.0)] == [0.0, 0.05, 1.0]
    for bad in (-0.001, 1.001, math.nan, math.inf):
        with pytest.raises(RecipeError, match=r"density must be in \[0, 1\], got .* \(layer 7, model math\)"):
            density.check(bad, "layer 7, model math")
    with pytest.raises(RecipeError):
        Param("weight", 0.0, 1.0, 1.0).check(math.nan, "layer 0")


# ---- DARE's masks

KEYS = [
    mask_key(seed, tensor, model)
    for seed in (0, 1)
    for tensor in ("a.weight", "b.weight")
    for model in ("math", "code")
]
N = 200_000


def mask(density, key, n=N):
    return dare.mask(torch.zeros(n), density, key).bool()


def words(key, n=N):
    """The hashes of n entries in [0, 2**32)."""
    return random_masks.hashed(random_masks.mixed(0, n), random_masks.split(key)).long() + 2**31


@settings(max_examples=60, deadline=None, derandomize=True)
@given(key=st.integers(-(2**63), 2**63 - 1), n=st.integers(0, 40), density=st.floats(0, 1))
def test_a_mask_is_the_hash_in_plain_integers(key, n, density):
    assert words(key, n).tolist() == [hash_reference(j, key) for j in range(n)]
    assert mask(density, key, n).tolist() == [hash_reference(j, key) < density * 2**32 for j in range(n)]


def test_an_index_has_its_bit_whatever_is_computed_with_it():
    whole = words(KEYS[0], 1000)
    assert torch.equal(words(KEYS[0], 400), whole[:400])
    for start in (1, 17, 999):
        assert torch.equal(
            random_masks.hashed(random_masks.mixed(start, 1000), random_masks.split(KEYS[0])).long() + 2**31,
            whole[start:],
        )
    shaped = dare.mask(torch.zeros(10, 5, 20), 0.3, KEYS[0])
    assert torch.equal(shaped.flatten(), dare.mask(torch.zeros(1000), 0.3, KEYS[0]))


@pytest.mark.gpu
def test_a_mask_is_the_same_on_a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert torch.equal(
        dare.mask(torch.zeros(N, device="cuda"), 0.3, KEYS[0]).cpu(), dare.mask(torch.zeros(N), 0.3, KEYS[0])
    )


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_the_kept_fraction_is_the_density(density):
    sigma = math.sqrt(N * density * (1 - density))
    for key in KEYS:
        assert abs(mask(density, key).sum().item() - N * density) < 4 * sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_is_zeros_and_ones_of_the_dtype_of_its_tensor(dtype):
    bits = dare.mask(torch.zeros(100, dtype=dtype), 0.5, 7)
    assert bits.dtype == dtype
    assert set(bits.tolist()) == {0.0, 1.0}
    assert torch.equal(bits.bool(), mask(0.5, 7, 100))


def test_nothing_is_kept_at_density_zero_and_everything_at_one():
    assert not mask(0.0, KEYS[0]).any()
    assert mask(1.0, KEYS[0]).all()


def test_an_entry_is_kept_from_the_density_just_above_its_number():
    for i, u in enumerate(words(KEYS[0], 50).tolist()):
        assert not mask(u / 2**32, KEYS[0], 50)[i]
        assert mask((u + 1) / 2**32, KEYS[0], 50)[i]


def test_masks_nest_as_the_density_falls():
    larger = mask(1.0, KEYS[3])
    for density in (0.999, 0.9, 0.5, 0.25, 0.1, 0.001):
        smaller = mask(density, KEYS[3])
        assert not (smaller & ~larger).any()
        assert smaller.sum() < larger.sum()
        larger = smaller


def test_masks_of_different_keys_are_independent():
    for density in (0.1, 0.5):
        masks = torch.stack(
            [mask(density, key) for key in [*KEYS, *(mask_key(2, "t", f"{i}") for i in range(24))]]
        )
        correlations = torch.corrcoef(masks.double()) - torch.eye(len(masks))
        assert correlations.abs().max() < 5 / math.sqrt(N)  # 5 sigma of independent bits


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 32, 64, 4096])
def test_neighbouring_entries_are_independent(lag):
    for key in KEYS[:4]:
        bits = mask(0.3, key)
        assert abs(correlation(bits[:-lag], bits[lag:])) < 5 / math.sqrt(N)


def test_uniform_numbers_fill_their_range_evenly_alone_and_in_pairs():
    for key in KEYS:
        u = words(key)
        for cells in (
            u >> 24,
            u & 255,
            (u[:-1] >> 28) * 16 + (u[1:] >> 28),
        ):  # high bits, low bits, neighbours
            count = torch.bincount(cells, minlength=256).double()
            expected = count.sum() / 256
            chi2 = ((count - expected) ** 2 / expected).sum().item()
            assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def test_a_mask_key_depends_on_seed_tensor_and_model():
    keys = {
        mask_key(seed, tensor, model)
        for seed in (0, 1, 10)
        for tensor in ("a", "b", "ab")
        for model in ("a", "b", "")
    }
    assert len(keys) == 27
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert mask_key(1, "1", "a") != mask_key(11, "", "a")


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_agreeing_weights_that_cancel_up_to_rounding_do_not_blow_up(name):
    """.1 + .2 - .3 is 2.8e-17 in 64-bit floats and 7e-9 in 32-bit ones: dividing by it gave 1e16."""
    rule, delta = METHODS[name], torch.tensor([1.0, 2.0, -1.0, 0.5])
    values = numbers(rule, 3, normalize=1.0, density=(1.0,) * 3)
    for order in itertools.permutations(range(3)):
        tensors = [[delta, delta, -delta][i] for i in order]
        given = values | {"weight": tuple((0.1, 0.2, -0.3)[i] for i in order)}
        out = torch.empty(4)
        base = torch.zeros(4)
        inputs = MergeInputs(tensors, base, [0] * 3)
        assert merge_tensor(rule.task_vector_sum, inputs, given, out, MagnitudeTables())
        for found in (out, rule.kernel(tensors, base, given, [0] * 3)):
            torch.testing.assert_close(found, 0.6 * delta, rtol=1e-5, atol=1e-6)
