"""Positions of disk tensors in an engine's parameters, against layouts that the tests write themselves."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from evomerge.evaluation.engines.weight_positions import Position, find_positions

SHAPES = {
    "embed": (300, 8),
    "layers.0.q": (8, 8),
    "layers.0.k": (4, 8),
    "layers.0.v": (4, 8),
    "layers.0.norm": (8,),
    "layers.0.down": (8, 200),
}
STARTS = {"layers.0.q": 0, "layers.0.k": 64, "layers.0.v": 96}


class Fused:
    """An engine that keeps q, k and v as rows of one matrix and pads the embedding with zeros."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.parameters = {
            "embed.weight": torch.full((320, 8), 3.0, dtype=dtype),
            "qkv": torch.ones(16, 8, dtype=dtype),
            "norm": torch.ones(8, dtype=dtype),
            "down": torch.randn(8, 200).to(dtype),
            "scale": torch.ones(1, dtype=dtype),
        }
        self.order = slice(None)  # of the columns of 'down'

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        own = self.parameters
        for name, tensor in tensors:
            if name in STARTS:
                own["qkv"].view(-1)[STARTS[name] : STARTS[name] + tensor.numel()] = tensor.reshape(-1)
            elif name == "embed":
                own["embed.weight"][:300] = tensor
                own["embed.weight"][300:] = 0
            else:
                own[name.removeprefix("layers.0.")].copy_(tensor[..., self.order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fused_and_padded_tensors_are_found_where_the_loader_puts_them(dtype: torch.dtype) -> None:
    engine = Fused(dtype)
    found = find_positions(engine.parameters, SHAPES, engine.load, dtype)
    assert found == {
        "embed": Position("embed.weight", 0, 2400),
        "layers.0.q": Position("qkv", 0, 64),
        "layers.0.k": Position("qkv", 64, 32),
        "layers.0.v": Position("qkv", 96, 32),
        "layers.0.norm": Position("norm", 0, 8),
        "layers.0.down": Position("down", 0, 1600),
    }
    assert float(engine.parameters["scale"]) == 1.0, "what no tensor feeds keeps its value"


def test_writing_at_the_positions_is_what_the_loader_does() -> None:
    engine, other = Fused(torch.float32), Fused(torch.float32)
    found = find_positions(engine.parameters, SHAPES, engine.load, torch.float32)
    assert isinstance(found, dict)
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for name, at in found.items():
        flat = engine.parameters[at.parameter].view(-1)
        flat[at.start : at.start + at.size] = values[name].reshape(-1)
    other.load(values.items())
    for name in ("embed.weight", "qkv", "norm", "down"):
        assert torch.equal(engine.parameters[name], other.parameters[name])


def test_a_tensor_whose_columns_are_permuted_is_refused_by_name() -> None:
    engine = Fused(torch.bfloat16)
    engine.order = torch.randperm(200, generator=torch.Generator().manual_seed(0))  # type: ignore[assignment]
    engine.parameters["norm"] = torch.ones(8, dtype=torch.bfloat16)
    shapes = {"layers.0.down": SHAPES["layers.0.down"]}
    found = find_positions(engine.parameters, shapes, engine.load, torch.bfloat16)
    assert found == "the elements of 'layers.0.down' are in another order"


def test_a_tensor_that_is_packed_away_is_refused_by_name() -> None:
    engine = Fused(torch.float32)

    def load(tensors: Iterable[tuple[str, Tensor]]) -> None:
        engine.load((name, tensor) for name, tensor in tensors if name != "layers.0.k")

    found = find_positions(engine.parameters, SHAPES, load, torch.float32)
    assert found == "'layers.0.k' is not one run of a parameter's elements"


@pytest.mark.parametrize("count", [1, 126, 127, 128, 300])
def test_any_number_of_tensors_is_told_apart(count: int) -> None:
    """Also tensors of one element, beside untouched ones that happen to hold a label."""
    sizes = {f"t{i}": (1 + i % 3,) for i in range(count)}
    own = {f"own.{name}": torch.full(shape, 5.0) for name, shape in sizes.items()}
    own |= {f"untouched.{i}": torch.full((4,), float(i)) for i in range(8)}

    def load(tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            own[f"own.{name}"].copy_(tensor)

    found = find_positions(own, sizes, load, torch.float32)
    assert found == {name: Position(f"own.{name}", 0, shape[0]) for name, shape in sizes.items()}
