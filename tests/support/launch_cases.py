"""Small models in padded memory, and the sums of a method over their tensors, for tests of launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.merge import mask_key
from evomerge.methods.declaration import Method
from evomerge.methods.fused import (
    MagnitudeTables,
    MergeInputs,
    WeightedSum,
    merge_tensor,
    weighted_sum_of,
)

SHAPES = {"norm": (33,), "bias": (48,), "q": (12, 64), "odd": (7, 131), "up": (24, 160)}
PAD = 64  # elements


@dataclass(frozen=True)
class Models:
    """bases: [tensors]; sources: [tensors][models]."""

    bases: list[Tensor]
    sources: list[list[Tensor]]


def padded(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, fill: float = 0.0) -> list[Tensor]:
    """Tensors of one allocation, each at a multiple of PAD elements."""
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) // PAD) * PAD
    flat = torch.full((end + PAD,), fill, dtype=dtype)
    offset = -(flat.data_ptr() // flat.element_size()) % PAD
    return [
        flat[offset + start :][: math.prod(shape)].view(shape)
        for start, shape in zip(starts, shapes, strict=True)
    ]


def models(
    count: int, dtype: torch.dtype, seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> Models:
    """Fine-tunes near a base, with zeros, equal differences and unchanged elements among them."""
    g = torch.Generator().manual_seed(seed)
    bases = padded(list(shapes.values()), dtype)
    for base in bases:
        base.copy_(torch.randn(base.shape, generator=g) * 0.02)
        base[torch.rand(base.shape, generator=g) < 0.02] = 0
    tuned = []
    for _ in range(count):
        tensors = padded(list(shapes.values()), dtype)
        for x, base in zip(tensors, bases, strict=True):
            x.copy_(base.float() + torch.randn(x.shape, generator=g) * 2e-3)
            same = torch.rand(x.shape, generator=g) < 0.1
            x[same] = base[same]
        tuned.append(tensors)
    return Models(bases, [list(row) for row in zip(*tuned, strict=True)])


def values_of(rule: Method, count: int, seed: int, **given: object) -> dict[str, object]:
    """Random values of a method's parameters, but for those given."""
    g = np.random.default_rng(seed)

    def some(low: float, high: float) -> tuple[float, ...]:
        return tuple(float(np.round(v, 4)) for v in g.uniform(low, high, count))

    chosen = {
        "weight": some(-0.5, 1.5),
        "density": some(0.1, 1.1),
        "gamma": some(0.0, 0.1),
        "epsilon": some(0.0, 0.2),
        "lambda": float(g.uniform(0.3, 1.7)),
        "normalize": float(g.integers(2)),
        "rescale": float(g.integers(2)),
    } | given
    values = {}
    for p in rule.params:
        default = (p.default,) * count if p.per == "model" else p.default
        value = chosen.get(p.name, default)
        values[p.name] = value if isinstance(value, tuple) == (p.per == "model") else default
    return values


def sums_of(
    rule: Method,
    case: Models,
    values: Sequence[Mapping[str, object]],
    out_dtype: torch.dtype,
    seed: int = 0,
) -> tuple[list[WeightedSum], list[Tensor]]:
    """(the sum of each tensor, the tensor as `merge_tensor` makes it); values: of each tensor."""
    declared, tables, sums, wanted = rule.task_vector_sum, MagnitudeTables(), [], []
    assert declared is not None
    for row, (base, sources) in enumerate(zip(case.bases, case.sources, strict=True)):
        keys = [mask_key(seed, str(row), str(i)) for i in range(len(sources))]
        inputs = MergeInputs(sources, None if declared.without_base else base, keys)
        out = torch.empty(base.shape, dtype=out_dtype)
        merge_tensor(declared, inputs, values[row], out, tables)
        wanted.append(out)
        sums.append(weighted_sum_of(declared, inputs, values[row], tables))
    return sums, wanted


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)
