"""Derivatives of merged tensors by their coefficients, against central differences of float64 kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomerge.methods import METHODS, Values, method
from evomerge.methods.task_vector_slopes import has_slopes, slopes

STEP = 1e-6
SOURCES = 3
NAMES = [name for name in METHODS if has_slopes(METHODS[name])]


def values_of(name: str, **given: Any) -> dict[str, float | tuple[float, ...]]:
    """Values of every parameter: weights that differ, densities inside, the rest as given or by default."""
    found: dict[str, float | tuple[float, ...]] = {}
    for number, p in enumerate(method(name).params):
        if p.name == "weight":
            found[p.name] = (0.7, -0.3, 1.1) if p.low < 0 else (0.7, 0.3, 0.5)
        elif p.per == "merge":
            found[p.name] = given.get(p.name, 0.8 if p.name == "lambda" else p.default)
        else:
            middle = p.low + 0.45 * (p.high - p.low)
            found[p.name] = tuple(middle + 0.01 * (i + number) for i in range(SOURCES))
            if p.flag:
                found[p.name] = (p.default,) * SOURCES
    return found


def tensors() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(sources, base, gradient) whose differences are exact in float32."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randint(-512, 512, (24, 32), generator=generator).float() / 256
    sources = [
        base + torch.randint(-512, 512, base.shape, generator=generator) / 1024 for _ in range(SOURCES)
    ]
    return sources, base, torch.randn(base.shape, generator=generator)


def loss(name: str, values: Values) -> float:
    """The sum of a merged tensor's elements times a gradient, in float64."""
    sources, base, gradient = tensors()
    rule = method(name)
    merged = rule.kernel(
        [source.double() for source in sources],
        base.double() if rule.needs_base else None,
        values,
        list(range(SOURCES)),
    )
    return float((merged * gradient.double()).sum())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_those_of_central_differences(name: str, normalize: bool) -> None:
    given = values_of(name, normalize=float(normalize))
    sources, base, gradient = tensors()
    rule = method(name)
    found = slopes(rule, sources, base if rule.needs_base else None, given, list(range(SOURCES)), gradient)
    weight = given["weight"]
    assert isinstance(weight, tuple)
    for i in range(SOURCES):
        ends = []
        for step in (STEP, -STEP):
            moved = (*weight[:i], weight[i] + step, *weight[i + 1 :])
            ends.append(loss(name, given | {"weight": moved}))
        by_weight = found["weight"]
        assert isinstance(by_weight, tuple)
        assert by_weight[i] == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-4, abs=1e-4)
    if "lambda" in given:
        factor = given["lambda"]
        assert isinstance(factor, float)
        ends = [loss(name, given | {"lambda": factor + step}) for step in (STEP, -STEP)]
        assert found["lambda"] == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-4, abs=1e-4)


def test_every_sum_of_task_vectors_has_slopes() -> None:
    assert {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs"} <= {
        *NAMES
    }
    assert not has_slopes(METHODS["slerp"])


def test_weights_that_cancel_leave_the_divisor_alone() -> None:
    given = values_of("task_arithmetic", normalize=1.0) | {"weight": (0.5, -0.5, 0.0)}
    sources, base, gradient = tensors()
    found = slopes(method("task_arithmetic"), sources, base, given, [0, 1, 2], gradient)
    for source, slope in zip(sources, found["weight"], strict=True):  # type: ignore[arg-type]
        assert slope == pytest.approx(
            float(0.8 * ((source - base) * gradient).double().sum()), rel=1e-5, abs=1e-5
        )
