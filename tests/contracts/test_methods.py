"""Laws that every merge method obeys, both by its kernel and by `fused.merge_tensor`."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from evomerge.merging.merge import mask_key
from evomerge.methods import METHODS, Method, Param, Values
from evomerge.methods.fused import MagnitudeTables, MergeInputs, merge_tensor
from tests.support.merge_references import corners, is_empty_average

Numbers = dict[str, float | tuple[float, ...]]
SHAPES = [(), (0,), (1,), (1, 1), (1, 7), (7, 1), (5, 6), (3, 0), (2, 3, 4)]


@dataclass(frozen=True)
class Case:
    """A method with a number of models, with or without a base."""

    rule: Method
    n: int
    based: bool

    @property
    def name(self) -> str:
        return f"{self.rule.name}-{self.n}" + "-base" * (self.based and self.rule.takes_base)


@dataclass(frozen=True)
class Way:
    """How a merge is run: by the kernel, or in one pass, where inputs and output have types of their own."""

    dtype: torch.dtype
    fused: bool = False
    out: torch.dtype | None = None

    @property
    def precision(self) -> float:
        return max(
            torch.finfo(t).eps
            for t in (self.dtype if not self.fused else torch.float32, self.out or self.dtype)
        )


KERNELS = [Way(torch.float32), Way(torch.float64)]
PASSES = [Way(torch.float32, True, torch.float32), Way(torch.bfloat16, True, torch.bfloat16)]
MIXED = [Way(torch.float32, True, torch.bfloat16), Way(torch.bfloat16, True, torch.float32)]
CASES = [
    Case(rule, n, based)
    for rule in METHODS.values()
    for n in range(rule.models[0], min(4, rule.models[1]) + 1)
    for based in ([True] if rule.needs_base else [False, True] if rule.takes_base else [False])
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
randomized = pytest.mark.parametrize(
    "rule", [m for m in METHODS.values() if m.randomized], ids=lambda m: m.name
)
few = settings(max_examples=3, deadline=None, derandomize=True)


def ways(rule: Method) -> list[Way]:
    return KERNELS + PASSES if rule.task_vector_sum else KERNELS


def merge(
    way: Way,
    rule: Method,
    tensors: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
) -> Tensor:
    if not way.fused:
        return rule.kernel(tensors, base, values, keys)
    assert rule.task_vector_sum is not None
    out = torch.full_like(tensors[0], math.nan, dtype=way.out)
    inputs = MergeInputs(tensors, base, keys)
    finite = merge_tensor(rule.task_vector_sum, inputs, values, out, MagnitudeTables())
    assert finite == bool(torch.isfinite(out).all())
    return out


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def models(
    case: Case, dtype: torch.dtype, shape: tuple[int, ...] = (5, 6), seed: int = 0, spread: float = 0.5
) -> tuple[list[Tensor], Tensor | None]:
    """Fine-tunes near a base, and the base if there is one."""
    base = normal(shape, seed)
    tensors = [(base + normal(shape, seed + i + 1, spread)).to(dtype) for i in range(case.n)]
    return tensors, base.to(dtype) if case.based else None


def keys_of(n: int, seed: int = 0) -> list[int]:
    return [mask_key(seed, "tensor", f"model {i}") for i in range(n)]


def bits(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def numbers(draw: st.DrawFn, rule: Method, n: int) -> Numbers:
    """Values within the bounds of a search, on a binary grid: sums of weights are exact in any order.

    No empty averages.
    """

    def one(p: Param) -> float:
        return (
            float(draw(st.integers(0, 1)))
            if p.flag
            else p.low + (p.high - p.low) * draw(st.integers(0, 64)) / 64
        )

    values: Numbers = {
        p.name: one(p) if p.per == "merge" else tuple(one(p) for _ in range(n)) for p in rule.params
    }
    return values | {"normalize": 0.0} if is_empty_average(rule, values) else values


def complete(rule: Method, n: int, **given: float | tuple[float, ...]) -> Numbers:
    """Those values, as far as the method has them, and defaults for the rest."""
    values: Numbers = {p.name: (p.default,) * n if p.per == "model" else p.default for p in rule.params}
    return values | {k: v for k, v in given.items() if rule.param(k)}


# ---- of all methods


@every_case
@settings(few, max_examples=2)
@given(data=st.data())
def test_shape_dtype_and_device_are_kept_inputs_left_alone_and_small_shapes_merge(
    case: Case, data: st.DataObject
):
    values, keys = data.draw(numbers(case.rule, case.n)), keys_of(case.n)
    for shape in SHAPES:
        for way in ways(case.rule) + MIXED * bool(case.rule.task_vector_sum):
            tensors, base = models(case, way.dtype, shape)
            inputs = [*tensors, *([] if base is None else [base])]
            before = [bits(x) for x in inputs]
            torch.manual_seed(1)
            state = torch.get_rng_state()
            out = merge(way, case.rule, tensors, base, values, keys)
            assert (out.shape, out.dtype, out.device) == (
                tensors[0].shape,
                way.out or way.dtype,
                tensors[0].device,
            )
            assert torch.isfinite(out).all()
            assert [bits(x) for x in inputs] == before
            assert not out.numel() or out.data_ptr() not in [x.data_ptr() for x in inputs], (
                "the result shares memory with an input"
            )
            assert torch.equal(torch.get_rng_state(), state)
            if shape == (2, 3, 4):
                assert bits(merge(way, case.rule, tensors, base, values, keys)) == bits(out)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, t, id=f"{c.name}-{t}") for c in CASES for t in (torch.bfloat16, torch.float16)],
)
def test_kernels_take_half_precision(case: Case, dtype: torch.dtype):
    for shape in SHAPES:
        tensors, base = models(case, dtype, shape)
        before = [bits(x) for x in tensors]
        out = case.rule.kernel(
            tensors, base, complete(case.rule, case.n, density=(0.5,) * case.n), keys_of(case.n)
        )
        assert (out.shape, out.dtype) == (tensors[0].shape, dtype)
        assert torch.isfinite(out).all()
        assert [bits(x) for x in tensors] == before


def degenerate(case: Case, dtype: torch.dtype) -> list[tuple[list[Tensor], Tensor | None]]:
    """Models as they come; all zeros; all equal, apart from a base of zeros; all opposite to the base."""
    shape = (3, 4)
    x, zero = normal(shape, 9).to(dtype), torch.zeros(shape, dtype=dtype)
    some = [models(case, dtype, shape)]
    for of_model, of_base in ((zero, zero), (x, zero), (-x, x)):
        some.append(([of_model] * case.n, of_base if case.based else None))
    return some


@every_case
@few
@given(data=st.data())
def test_finite_at_every_corner_of_the_declared_bounds(case: Case, data: st.DataObject):
    """For more than two models at corners that are drawn."""

    def corner() -> Numbers:
        values: Numbers = {
            p.name: tuple(data.draw(st.sampled_from([p.low, p.high])) for _ in range(case.n))
            for p in case.rule.params
        }
        values = {p.name: values[p.name] if p.per == "model" else values[p.name][0] for p in case.rule.params}
        return values | {"normalize": 0.0} if is_empty_average(case.rule, values) else values

    chosen = [corner() for _ in range(4)]
    for way in ways(case.rule):
        for tensors, base in degenerate(case, way.dtype):
            for values in chosen:
                assert torch.isfinite(merge(way, case.rule, tensors, base, values, keys_of(case.n))).all(), (
                    values
                )


@pytest.mark.parametrize("case", [c for c in CASES if c.n <= 2], ids=lambda c: c.name)
def test_finite_at_all_corners_with_up_to_two_models(case: Case):
    for way in KERNELS[:1] + (PASSES[:1] if case.rule.task_vector_sum else []):
        for tensors, base in degenerate(case, way.dtype)[::3]:
            for values in corners(case.rule, case.n):
                assert torch.isfinite(merge(way, case.rule, tensors, base, values, keys_of(case.n))).all(), (
                    values
                )


@pytest.mark.parametrize("case", [c for c in CASES if c.based], ids=lambda c: c.name)
@few
@given(data=st.data())
def test_parents_equal_to_the_base_give_the_base(case: Case, data: st.DataObject):
    values, seed = data.draw(numbers(case.rule, case.n)), data.draw(st.integers(0, 99))
    for shape in SHAPES:
        for way in ways(case.rule):
            base = normal(shape, seed).to(way.dtype)
            out = merge(way, case.rule, [base.clone() for _ in range(case.n)], base, values, keys_of(case.n))
            if case.rule.task_vector_sum:
                assert torch.equal(out, base.to(out.dtype)), values
            else:
                torch.testing.assert_close(out, base, rtol=4 * way.precision, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.n > 1], ids=lambda c: c.name)
@settings(few, max_examples=8)
@given(data=st.data())
def test_the_order_of_models_with_their_numbers_and_keys_does_not_matter(case: Case, data: st.DataObject):
    """No method is excepted: those that tell one model from another take one model and a base."""
    rule, n, keys = case.rule, case.n, keys_of(case.n)
    values, order = data.draw(numbers(rule, n)), data.draw(st.permutations(range(n)))
    turned = {k: tuple(v[i] for i in order) if isinstance(v, tuple) else v for k, v in values.items()}
    for way in ways(rule):
        tensors, base = models(
            case, way.dtype, (9, 11), data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.003, 0.5]))
        )
        straight = merge(way, rule, tensors, base, values, keys)
        out = merge(way, rule, [tensors[i] for i in order], base, turned, [keys[i] for i in order])
        scale = max(1.0, float(straight.abs().max()))
        torch.testing.assert_close(
            out, straight, rtol=0, atol=scale * (1e-5 if way.precision < 1e-5 else way.precision)
        )


@pytest.mark.parametrize(
    ("case", "param", "way"),
    [
        pytest.param(c, p, way, id=f"{c.name}-{p.name}-{'pass' if way.fused else 'kernel'}-{way.dtype}")
        for c in CASES
        if c.n == min(3, c.rule.models[1])
        for p in c.rule.params
        for way in ways(c.rule)
        if way.dtype != torch.float64
    ],
)
def test_each_declared_parameter_changes_the_result(case: Case, param: Param, way: Way):
    """For some input, by moving it from one bound to the other: of each model alone if each has its own."""
    for which in range(case.n if param.per == "model" else 1):
        assert changes(way, case, param, which), f"model {which}"


def changes(way: Way, case: Case, param: Param, which: int) -> bool:
    def at(values: Numbers, bound: float) -> Numbers:
        old = values[param.name]
        return values | {
            param.name: tuple(bound if i == which else v for i, v in enumerate(old))
            if isinstance(old, tuple)
            else bound
        }

    def differ(point: tuple[Numbers, int, float]) -> bool:
        values, seed, spread = point
        tensors, base = models(case, way.dtype, (8, 9), seed, spread)
        ends = [at(values, bound) for bound in (param.low, param.high)]
        outs = [
            merge(way, case.rule, tensors, base, v, keys_of(case.n))
            for v in ends
            if not is_empty_average(case.rule, v)
        ]
        return len(outs) == 2 and not torch.equal(*outs)

    points = st.tuples(numbers(case.rule, case.n), st.integers(0, 9), st.sampled_from([0.5, 0.01, 0.001]))
    try:
        find(
            points,
            differ,
            settings=settings(
                max_examples=60, derandomize=True, deadline=None, database=None, phases=[Phase.generate]
            ),
        )
    except NoSuchExample:
        return False
    return True


@pytest.mark.parametrize("case", [c for c in CASES if c.rule.task_vector_sum], ids=lambda c: c.name)
@few
@given(data=st.data())
def test_one_pass_gives_what_the_kernel_gives_in_float64(case: Case, data: st.DataObject):
    values, keys, seed = data.draw(numbers(case.rule, case.n)), keys_of(case.n), data.draw(st.integers(0, 99))
    for way in PASSES + MIXED:
        for shape in ((), (23, 31)):
            tensors, base = models(case, way.dtype, shape, seed)
            want = case.rule.kernel(
                [x.double() for x in tensors], None if base is None else base.double(), values, keys
            )
            out = merge(way, case.rule, tensors, base, values, keys)
            torch.testing.assert_close(
                out.double(),
                want,
                rtol=2e-5 if way.out == torch.float32 else 0.005,
                atol=2e-5 * max(1.0, float(want.abs().max())),
            )


@pytest.mark.parametrize("rule", [pytest.param(m, id=m.name) for m in METHODS.values() if m.task_vector_sum])
def test_rows_of_more_than_65536_entries(rule: Method):
    case = Case(rule, 2, rule.needs_base)
    values, keys = complete(rule, 2, density=(0.5, 0.3)), keys_of(2)
    tensors, base = models(case, torch.float32, (70_000,))
    want = rule.kernel([x.double() for x in tensors], None if base is None else base.double(), values, keys)
    torch.testing.assert_close(
        merge(PASSES[0], rule, tensors, base, values, keys).double(), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.rule.randomized and c.n <= 2], ids=lambda c: c.name
)
def test_methods_that_are_not_randomized_ignore_their_keys(case: Case):
    for way in ways(case.rule):
        tensors, base = models(case, way.dtype)
        values = complete(case.rule, case.n, density=(0.4,) * case.n)
        assert torch.equal(
            merge(way, case.rule, tensors, base, values, keys_of(case.n)),
            merge(way, case.rule, tensors, base, values, keys_of(case.n, 1)),
        )


@pytest.mark.gpu
def test_a_device_gives_what_the_cpu_gives():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for case, shape in itertools.product(CASES, SHAPES):
        values = complete(case.rule, case.n, density=(0.5,) * case.n, rescale=1.0)
        for way in ways(case.rule):
            tensors, base = models(case, way.dtype, shape)
            out = merge(
                way,
                case.rule,
                [x.cuda() for x in tensors],
                None if base is None else base.cuda(),
                values,
                keys_of(case.n),
            )
            assert out.is_cuda
            here = merge(way, case.rule, tensors, base, values, keys_of(case.n))
            assert not way.fused or bits(out) == bits(here), case.name
            torch.testing.assert_close(out.cpu(), here, rtol=1e-5, atol=1e-5)


# ---- of masks: kept entries are seen where the base is zero and one model has weight one


def kept(way: Way, rule: Method, delta: Tensor, density: float, key: int, **given: float) -> Tensor:
    """What is left of one model's difference, float64."""
    given = {"weight": 1.0, "density": density, "normalize": 0.0, "rescale": 0.0, "lambda": 1.0} | given
    values = {k: (v,) if (p := rule.param(k)) and p.per == "model" else v for k, v in given.items()}
    x = delta.to(way.dtype)
    return merge(way, rule, [x], torch.zeros_like(x), complete(rule, 1, **values), [key]).double()


def probabilities(rule: Method, delta: Tensor, density: float) -> Tensor:
    """Of each entry to be kept, at the defaults of other parameters; equal entries rank in their order."""
    epsilon = rule.param("epsilon")
    if epsilon is None:
        return torch.full_like(delta, density)
    e, width = min(epsilon.default, density, 1 - density), delta.shape[-1]
    rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    return density - e + 2 * e * rank / (width - 1)


def within_five_sigma(mask: Tensor, p: Tensor, worth: Tensor) -> None:
    sigma = math.sqrt(float((worth**2 * p * (1 - p)).sum()))
    assert abs(float((worth * (mask.double() - p)).sum())) <= 5 * sigma + 1e-6 * float(worth.abs().sum())


DENSITIES = (0.1, 0.37, 0.5, 0.9)
LONG = (150, 200)


def at_every_density(rule: Method, check: Callable[[Way, Tensor, float, int], None]) -> None:
    for way in ways(rule):
        if way.dtype == (way.out or way.dtype):  # what is kept is kept exactly
            delta = normal(LONG, 5).to(way.dtype).double()
            for density, key in zip(DENSITIES, keys_of(len(DENSITIES), 3), strict=True):
                check(way, delta, density, key)


@randomized
def test_kept_entries_their_norm_and_their_signs_are_as_many_as_the_theory_says(rule: Method):
    def check(way: Way, delta: Tensor, density: float, key: int) -> None:
        left = kept(way, rule, delta, density, key)
        mask, p = left != 0, probabilities(rule, delta, density)
        assert torch.equal(left, torch.where(mask, delta, 0.0)), "what is kept is kept as it is"
        assert float(p.mean()) == pytest.approx(density)
        for worth in (torch.ones_like(p), delta.abs(), (delta > 0).double(), delta):
            within_five_sigma(mask, p, worth)
        other = kept(way, rule, delta.flip(0), density, key ^ mask_key(0, "another", "key")).flip(0) != 0
        within_five_sigma(mask & other, p * p, torch.ones_like(p))  # masks of two models are independent

    at_every_density(rule, check)


@randomized
def test_two_models_agree_in_sign_on_what_both_keep_as_often_as_before(rule: Method):
    def check(way: Way, delta: Tensor, density: float, key: int) -> None:
        second = (0.5 * delta + normal(LONG, 6)).to(way.dtype).double()
        both = (kept(way, rule, delta, density, key) != 0) & (
            kept(way, rule, second, density, key ^ mask_key(0, "another", "key")) != 0
        )
        p = probabilities(rule, delta, density) * probabilities(rule, second, density)
        within_five_sigma(both, p, (delta * second > 0).double())

    at_every_density(rule, check)


@randomized
def test_rescaled_entries_have_the_norm_of_all(rule: Method):
    def check(way: Way, delta: Tensor, density: float, key: int) -> None:
        left = kept(way, rule, delta, density, key, rescale=1.0)
        plain = kept(way, rule, delta, density, key)
        assert torch.equal(left != 0, plain != 0)
        assert float(left.abs().sum()) == pytest.approx(
            float(delta.abs().sum()), rel=max(2e-5, way.precision)
        )
        share = float(plain.abs().sum() / delta.abs().sum())
        torch.testing.assert_close(left * share, plain, rtol=2e-5 + way.precision, atol=0)

    at_every_density(rule, check)


@randomized
def test_the_same_key_gives_the_same_mask_and_another_key_another(rule: Method):
    def check(way: Way, delta: Tensor, density: float, key: int) -> None:
        left = kept(way, rule, delta, density, key)
        assert torch.equal(left, kept(way, rule, delta, density, key))
        for changed in (key ^ 1, key ^ (1 << 40), ~key, key + 1):
            changed = (changed + 2**63) % 2**64 - 2**63
            assert not torch.equal(left, kept(way, rule, delta, density, changed))

    at_every_density(rule, check)


@pytest.mark.parametrize("rule", [m for m in METHODS.values() if m.param("density")], ids=lambda m: m.name)
@few
@given(data=st.data())
def test_what_a_lower_density_keeps_a_higher_one_keeps_too(rule: Method, data: st.DataObject):
    """Of every method with a density, random or not; nothing at 0 and everything at 1."""
    own = [p for p in rule.params if p.per == "model" and p.name not in ("weight", "density")]
    given = {p.name: p.low + (p.high - p.low) * data.draw(st.integers(0, 8)) / 8 for p in own}
    key = data.draw(st.integers(-(2**63), 2**63 - 1))
    middle = data.draw(st.lists(st.floats(0.001, 0.999), min_size=3, max_size=5))
    for way in ways(rule):
        delta = normal((20, 30), 4).to(way.dtype)
        masks = [kept(way, rule, delta, d, key, **given) != 0 for d in (0.0, *sorted(middle), 1.0)]
        assert not masks[0].any()
        assert masks[-1].all()
        assert not any(bool((smaller & ~larger).any()) for smaller, larger in itertools.pairwise(masks))
