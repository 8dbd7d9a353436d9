"""Arenas: where tensors lie, what lies between them, and that views are the tensors."""

from __future__ import annotations

import pytest
import torch

from evomerge.checkpoints.safetensors_headers import ITEM_BYTES, TensorInfo
from evomerge.merging.arena import (
    ALIGNMENT,
    STORED_TYPES,
    Arena,
    allocate_arena,
    arena_layout,
    arena_layout_of_headers,
)

TENSORS = {
    "matrix": ((5, 13), torch.bfloat16),  # 65 elements: one beyond a multiple of 64
    "bias": ((7,), torch.float32),
    "scalar": ((), torch.bfloat16),
    "nothing": ((0, 4), torch.bfloat16),
    "row": ((64,), torch.bfloat16),  # exactly one multiple
    "ids": ((3,), torch.int64),
}


def test_tensors_lie_at_multiples_of_64_elements_and_do_not_overlap() -> None:
    layout = arena_layout(TENSORS)
    assert [p.offset for p in layout.places.values() if p.dtype == torch.bfloat16] == [0, 128, 192, 192]
    assert dict(layout.lengths) == {torch.bfloat16: 256, torch.float32: 64, torch.int64: 64}
    assert layout.nbytes == 2 * 256 + 4 * 64 + 8 * 64
    assert all(place.offset % ALIGNMENT == 0 for place in layout.places.values())


def test_a_view_is_written_where_it_lies_and_padding_stays_zero() -> None:
    arena = allocate_arena(arena_layout(TENSORS), "cpu")
    for name, (shape, dtype) in TENSORS.items():
        view = arena.view[name]
        assert (tuple(view.shape), view.dtype, view.is_contiguous()) == (shape, dtype, True)
        view.fill_(1)
    assert {dtype: int((flat != 0).sum()) for dtype, flat in arena.allocations.items()} == {
        torch.bfloat16: 65 + 1 + 64,
        torch.float32: 7,
        torch.int64: 3,
    }
    flat = arena.allocations[torch.bfloat16]
    assert (arena.view["row"].data_ptr() - flat.data_ptr()) // 2 == 192
    assert flat[65:128].eq(0).all()


def test_headers_give_the_stored_types() -> None:
    assert {name: dtype.itemsize for name, dtype in STORED_TYPES.items()} == ITEM_BYTES
    layout = arena_layout_of_headers(
        {"a": TensorInfo((3, 2), "F16", "x"), "b": TensorInfo((2,), "BOOL", "x")}
    )
    assert {name: p.dtype for name, p in layout.places.items()} == {"a": torch.float16, "b": torch.bool}


def test_an_arena_over_given_allocations_shares_their_memory_and_refuses_others() -> None:
    layout = arena_layout({"a": ((2, 3), torch.float32)})
    flat = torch.zeros(64)
    Arena(layout, {torch.float32: flat}).view["a"][1, 2] = 9.0
    assert flat[5] == 9.0
    for wrong in ({}, {torch.float32: flat[:63]}, {torch.float32: flat.half()}):
        with pytest.raises(ValueError, match="an arena needs 64 elements"):
            Arena(layout, wrong)
