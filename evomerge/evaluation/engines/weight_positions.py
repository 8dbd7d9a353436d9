"""Where each tensor of a checkpoint lies among an engine's parameters.

An engine keeps some tensors as parts of others, such as queries, keys and values as rows of one matrix. Where
they are is not read from its code but observed: its own loader is given numbers, and they are looked for. A
tensor that does not come back as one run of consecutive elements cannot be written in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT = 128  # numbers below are exact in every type of numbers, bfloat16 included
_GROUP = _DIGIT - 1  # tensors that are told apart by one digit that is not 0

Load = Callable[[Iterable[tuple[str, Tensor]]], object]


@dataclass(frozen=True, slots=True)
class Position:
    """A run of consecutive elements of a parameter.

    Attributes:
        parameter: Its name in the engine's model.
        start: First element.
        size: Number of elements.
    """

    parameter: str
    start: int
    size: int


def find_positions(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], load: Load, dtype: torch.dtype
) -> dict[str, Position] | str:
    """Finds where tensors lie. All that is fed has other values afterwards and is to be loaded again.

    Args:
        parameters: The engine's own, by name, contiguous.
        shapes: Name on disk -> shape.
        load: The engine's loader of (name on disk, tensor).
        dtype: Of the tensors that it is given.

    Returns:
        Name on disk -> position; or why that cannot be told, which names a tensor.
    """
    device = next(iter(parameters.values())).device
    broken = next((name for name, own in parameters.items() if not own.is_contiguous()), None)
    if broken is not None:
        return f"parameter '{broken}' is not contiguous"
    found: dict[str, Position] = {}
    names = list(shapes)
    for start in range(0, len(names), _GROUP):
        group = names[start : start + _GROUP]
        runs = _labelled(parameters, group, shapes, load, dtype, device)
        for name in group:
            own = runs.get(name, [])
            if len(own) != 1 or own[0].size != math.prod(shapes[name]):
                return f"'{name}' is not one run of a parameter's elements"
            found[name] = own[0]
    wrong = _first_unordered(parameters, shapes, found, load, dtype, device)
    return found if wrong is None else f"the elements of '{wrong}' are in another order"


def _labelled(
    parameters: Mapping[str, Tensor],
    group: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    load: Load,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, list[Position]]:
    """The runs of each tensor of a group.

    Tensors are filled with their number, and once more with another: what was there before by chance does not
    change with it.
    """
    seen: list[set[tuple[str, int, int, int]]] = []
    for turned in (False, True):
        labels = {name: (i + turned) % _GROUP + 1 for i, name in enumerate(group)}
        load(
            (name, torch.full(shapes[name], label, dtype=dtype, device=device))
            for name, label in labels.items()
        )
        by_label = {label: i for i, label in enumerate(labels.values())}
        seen.append(
            {
                (name, start, size, by_label[label])
                for name, own in parameters.items()
                for start, size, label in _runs(own, by_label)
            }
        )
    runs: dict[str, list[Position]] = {}
    for name, start, size, i in sorted(seen[0] & seen[1]):
        runs.setdefault(group[i], []).append(Position(name, start, size))
    return runs


def _runs(parameter: Tensor, labels: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """(start, size, label) of each run of equal elements that are labels."""
    flat = parameter.detach().reshape(-1)
    if not flat.numel():
        return
    ends = torch.nonzero(flat[1:] != flat[:-1]).reshape(-1) + 1
    if len(ends) > flat.numel() // 2:  # ordinary weights, which hold no long run
        return
    bounds = [0, *ends.tolist(), flat.numel()]
    for start, end in itertools.pairwise(bounds):
        value = float(flat[start])
        if value in labels:
            yield start, end - start, int(value)


def _first_unordered(
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    positions: Mapping[str, Position],
    load: Load,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """The first tensor whose elements do not follow each other as on disk; None where all do."""
    largest = max(map(math.prod, shapes.values()), default=0)
    place = 1
    while place < largest:
        load((name, _digits(shape, place, dtype, device)) for name, shape in shapes.items())
        for name, shape in shapes.items():
            at = positions[name]
            got = parameters[at.parameter].detach().reshape(-1)[at.start : at.start + at.size]
            if not torch.equal(got, _digits(shape, place, got.dtype, device).reshape(-1)):
                return name
        place *= _DIGIT
    return None


def _digits(shape: tuple[int, ...], place: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A digit, of base `_DIGIT`, of the number of each element."""
    numbers = torch.arange(math.prod(shape), device=device)
    return (numbers // place % _DIGIT).to(dtype).reshape(shape)
