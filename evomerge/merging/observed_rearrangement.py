"""Which strided slice of its results each input of a rearrangement becomes, observed on numbered elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Shape = tuple[int, ...]
Rearrange = Callable[[Sequence[Tensor]], dict[str, Tensor]]
"""Tensors -> results by name, each element moved and none changed."""
_DIGIT = 31  # bits of an element's number that one int32 pass carries


@dataclass(frozen=True, slots=True)
class SourceSlice:
    """Where one input lies in the results.

    Attributes:
        target: Number of the result.
        strides: Its strides there, in elements of the contiguous result.
        offset: Position of its first element there.
    """

    target: int
    strides: tuple[int, ...]
    offset: int


def observe(
    rearrange: Rearrange, shapes: Sequence[Shape], targets: Sequence[str]
) -> list[SourceSlice] | None:
    """Finds the slice of the results that each input becomes.

    Marks on the corner and the first step along each axis of every input give the strides. Then every element
    is numbered, and every number is compared with the one where the strides say it went: the answer is
    proved, not sampled. Needs up to three int32 copies of one group at a time, such as the gate_up
    projections of one layer's experts.

    Args:
        rearrange: The rearrangement.
        shapes: Shapes of its inputs.
        targets: Names of its results.

    Returns:
        One slice an input; None unless the rearrangement is one by strides.
    """
    flat_marks = [_marks(shape) for shape in shapes]
    *first, count = accumulate((len(marks) for marks in flat_marks), initial=1)
    if count >= 2**15 or any(0 in shape for shape in shapes):
        return None
    sources = [_marked(*source) for source in zip(shapes, flat_marks, first, strict=True)]
    positions = _positions(rearrange(sources), targets)
    slices = []
    for marks, start in zip(flat_marks, first, strict=True):
        if start not in positions:
            return None
        target, corner = positions[start]
        strides = []
        for number, mark in enumerate(marks[1:], start + 1):
            _, position = positions.get(number, (target, corner)) if mark else (target, corner)
            strides.append(position - corner)
        slices.append(SourceSlice(target, tuple(strides), corner))
    return slices if _is_proved(rearrange, shapes, targets, slices) else None


def _marks(shape: Shape) -> list[int]:
    """Flat index of a tensor's corner, then of one step along each axis; 0 where there is no such step."""
    steps = torch.empty(shape, device="meta").stride()
    return [0] + [step if size > 1 else 0 for size, step in zip(shape, steps, strict=True)]


def _marked(shape: Shape, marks: Sequence[int], start: int) -> Tensor:
    """Zeros [shape] with start, start + 1, ... at the flat indices; the first wins where two are equal."""
    source = torch.zeros(shape, dtype=torch.int16)
    for number, flat in reversed(list(enumerate(marks, start))):
        source.view(-1)[flat] = number
    return source


def _positions(values: Mapping[str, Tensor], targets: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Mark -> (number of the result, flat position there)."""
    positions: dict[int, tuple[int, int]] = {}
    for number, target in enumerate(targets):
        flat = values[target].reshape(-1)
        for position in flat.nonzero().view(-1).tolist():
            positions[int(flat[position])] = (number, position)
    return positions


def _is_proved(
    rearrange: Rearrange, shapes: Sequence[Shape], targets: Sequence[str], slices: Sequence[SourceSlice]
) -> bool:
    """Whether every input element lies where the strides say, and nothing else lies in the results."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    starts, total = [0, *accumulate(sizes)], sum(sizes)

    def numbered(source: int, shift: int) -> Tensor:
        start, end = starts[source], starts[source + 1]
        if total <= 2**_DIGIT:
            digits = torch.arange(start, end, dtype=torch.int32)
        else:
            digits = ((torch.arange(start, end) >> shift) & (2**_DIGIT - 1)).to(torch.int32)
        return digits.view(shapes[source])

    for shift in range(0, total.bit_length(), _DIGIT):
        results = rearrange([numbered(source, shift) for source in range(len(sizes))])
        values = [results[target].contiguous() for target in targets]
        if sum(value.numel() for value in values) != total:
            return False
        for source, (shape, part) in enumerate(zip(shapes, slices, strict=True)):
            last = part.offset + sum(
                (size - 1) * step for size, step in zip(shape, part.strides, strict=True)
            )
            if min(part.strides, default=0) < 0 or last >= values[part.target].numel():
                return False
            moved = values[part.target].as_strided(shape, part.strides, part.offset)
            if not torch.equal(moved, numbered(source, shift)):
                return False
    return True
