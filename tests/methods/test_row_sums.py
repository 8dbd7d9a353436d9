"""Sums with a weight for each row: rows merged one by one, bits of equal rows, and central differences."""

from __future__ import annotations

import pytest
import torch

from evomerge.methods import METHODS, Values, method
from evomerge.methods.fused import MagnitudeTables, MergeInputs, merge_tensor
from evomerge.methods.row_sums import merge_rows, row_slopes, takes_rows

ROWS, WIDTH, SOURCES, STEP = 7, 5, 3, 1e-6
NAMES = ("task_arithmetic", "linear")


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(sources, base)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, WIDTH, generator=generator)
    sources = [base + 0.3 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(SOURCES)]
    return [source.to(dtype) for source in sources], base.to(dtype)


def table(seed: int = 1) -> list[tuple[float, ...]]:
    """[sources][rows] of weights."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(SOURCES, ROWS, generator=generator, dtype=torch.float64) + 0.2
    return [tuple(row) for row in drawn.tolist()]


def values(name: str, *, normalize: bool, weight: float = 0.0) -> Values:
    """Values of a method's parameters."""
    given: dict[str, float | tuple[float, ...]] = {"normalize": float(normalize)}
    given["weight"] = (weight,) * SOURCES
    return given | ({"lambda": 0.7} if name == "task_arithmetic" else {})


def exact(name: str, given: Values, weights: list[tuple[float, ...]]) -> torch.Tensor:
    """The merge in float64, row by row and element by element in loops."""
    sources, base = tensors()
    merged = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    needs_base = method(name).needs_base
    for row in range(ROWS):
        own = [of_source[row] for of_source in weights]
        divisor = sum(own) if given["normalize"] else 1.0
        for column in range(WIDTH):
            b = float(base[row, column]) if needs_base else 0.0
            total = sum(w * (float(x[row, column]) - b) for w, x in zip(own, sources, strict=True))
            factor = given.get("lambda", 1.0)
            assert isinstance(factor, float)
            merged[row, column] = b + factor * total / divisor
    return merged


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_merged_by_their_own_weights(name: str, normalize: bool) -> None:
    sources, base = tensors()
    given, weights = values(name, normalize=normalize), table()
    out = torch.empty(ROWS, WIDTH)
    assert merge_rows(sources, base if method(name).needs_base else None, given, weights, out)
    assert torch.allclose(out.double(), exact(name, given, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_equal_weight_have_the_bits_of_one_weight(
    name: str, normalize: bool, dtype: torch.dtype
) -> None:
    sources, base = tensors(dtype=dtype)
    rule = method(name)
    assert rule.task_vector_sum is not None
    given = values(name, normalize=normalize, weight=0.37)
    inputs = MergeInputs(sources, base if rule.needs_base else None, (0,) * SOURCES)
    wanted, found = torch.empty(ROWS, WIDTH, dtype=dtype), torch.empty(ROWS, WIDTH, dtype=dtype)
    merge_tensor(rule.task_vector_sum, inputs, given, wanted, MagnitudeTables())
    merge_rows(sources, inputs.base, given, [(0.37,) * ROWS] * SOURCES, found)
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_central_differences(name: str, normalize: bool) -> None:
    sources, base = tensors()
    given, weights = values(name, normalize=normalize), table()
    gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    found = row_slopes(sources, base if method(name).needs_base else None, given, weights, gradient)
    for source in range(SOURCES):
        for row in range(ROWS):
            ends = []
            for step in (STEP, -STEP):
                moved = [list(of_source) for of_source in weights]
                moved[source][row] += step
                merged = exact(name, given, [tuple(of_source) for of_source in moved])
                ends.append(float((merged * gradient.double()).sum()))
            wanted = (ends[0] - ends[1]) / (2 * STEP)
            assert float(found[source][row]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_result_that_is_not_finite_is_said() -> None:
    sources, base = tensors()
    sources[1][3, 2] = torch.inf
    assert not merge_rows(
        sources, base, values("task_arithmetic", normalize=False), table(), torch.empty(ROWS, WIDTH)
    )


def test_plain_sums_alone_take_rows() -> None:
    assert {name for name in METHODS if takes_rows(METHODS[name])} >= set(NAMES)
    assert not any(takes_rows(METHODS[name]) for name in ("ties", "dare_linear", "della", "slerp"))
