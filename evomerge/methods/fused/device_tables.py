"""What a search measures once, on the device and for all tensors of a table at once, by `triton_tables`.

The k largest magnitudes for many k are found by a radix descent: six launches count the digits of the keys
(magnitude downwards, then index) that begin as a wanted one does; between them a cumulative sum and a binary
search say which digit is next. No sort, no copy of the models; the answers are those of `torch_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused.exact_products import REST_BITS
from evomerge.methods.fused.tensor_table import TensorTable

Array = np.ndarray[Any, np.dtype[Any]]
ROWS_AT_ONCE = 48
"""Rows of one descent for a thousand densities: their counts take up to 33 MB each."""
_REPLICAS = 8
_STEPS, _BLOCK = 16, 2048
_GREATEST = 0x7FFFFFFF
COMPILATION = {"num_warps": 8, "enable_fp_fusion": False}
"""Options of every launch, see `triton_kernels.COMPILATION`."""


def largest(table: TensorTable) -> Tensor:
    """The largest magnitude of every x_i - base (of every x_i in a table without bases).

    Args:
        table: The rows; outputs are not touched.

    Returns:
        [rows, sources] float32 on the device: 0 for an empty row, NaN where any element is.
    """
    from evomerge.methods.fused import triton_tables

    tops = torch.zeros(table.rows, table.width, dtype=torch.int32, device=table.device)
    constants = {"N": table.width, "BASED": table.bases is not None, "SOURCES": _types(table)}
    _launch(triton_tables.largest, table, tops, **constants)
    return tops.view(torch.float32)


def product_sums(
    table: TensorTable, pairs: Sequence[tuple[int, int]], exponents: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Sums of whole numbers that are dot products, see `exact_products`.

    Args:
        table: The rows; outputs are not touched.
        pairs: Numbers of the two sources of each dot product.
        exponents: [rows][pairs]: u of each.

    Returns:
        [rows][pairs]: sums of whole * 2**REST_BITS + rest.
    """
    from evomerge.methods.fused import triton_tables

    units = torch.tensor([[2.0**u for u in row] for row in exponents], dtype=torch.float64)
    sums = torch.zeros(table.rows, len(pairs), 2, dtype=torch.int64, device=table.device)
    there = units.to(table.device)
    for product, (a, b) in enumerate(pairs):
        numbers = (table.width, a, b, product, len(pairs))
        types = {"TYPE_A": table.types[2 + a], "TYPE_B": table.types[2 + b]}
        constants = types | {"BASED": table.bases is not None}
        _launch(triton_tables.product_sums, table, there, sums, *numbers, **constants)
    return [[(whole << REST_BITS) + rest for whole, rest in row] for row in sums.tolist()]


def hash_sums(table: TensorTable, keys: Sequence[tuple[int, int]], units: Tensor, grid: int) -> Tensor:
    """Sums of floor(unit * |x - base|) by the cell of an element's hash.

    Args:
        table: Rows of one source and a base.
        keys: Of each row, see `random_masks.split`.
        units: [rows] float32.
        grid: Number of cells.

    Returns:
        [rows, grid] int64 on the device.
    """
    from evomerge.methods.fused import triton_tables

    sums = torch.zeros(table.rows, _REPLICAS, grid, dtype=torch.int64, device=table.device)
    there = torch.tensor(keys, dtype=torch.int32).to(table.device)
    constants = {"GRID": grid, "REPLICAS": _REPLICAS, "SOURCES": _types(table)}
    _launch(triton_tables.hash_sums, table, there, units.to(table.device, torch.float32), sums, **constants)
    return sums.sum(1)


def top_k(table: TensorTable, counts: Array) -> tuple[Tensor, Tensor]:
    """The k elements of largest |x - base| for many k of every row; of equal ones the first come first.

    Args:
        table: Rows of one source and a base, none empty; ROWS_AT_ONCE at most for a thousand k.
        counts: [rows, k] int64: the k, ascending, each in [1, size of the row].

    Returns:
        [rows, k] on the device: float32 threshold, int64 index of the last element at it.
    """
    missing = torch.from_numpy(np.ascontiguousarray(counts, np.int64)).to(table.device)
    sizes = table.launch_sizes()
    widths = [2048, 1024, 1024, (int(sizes.max()) - 1 >> 20) + 1, 1024, 1024]
    node = torch.zeros_like(missing)
    nodes, node_counts = 1, [1] * 6
    children: list[Tensor] = []
    digits = []
    for level, width in enumerate(widths):
        node_counts[level] = nodes
        up_to = _counted(table, level, children, node_counts, widths).cumsum(1)
        start = node * width
        before = _before(up_to, start)
        place = torch.searchsorted(up_to, before + missing).clamp_(max=nodes * width - 1)
        missing = missing - (_before(up_to, place) - before)
        digits.append(place - start)
        if level < 5:
            is_new = place[:, 1:] != place[:, :-1]
            node = torch.cat([torch.zeros_like(place[:, :1]), is_new.long().cumsum(1)], 1)
            child = torch.full_like(up_to, -1, dtype=torch.int32)
            children.append(child.scatter_(1, place, node.int()))
            nodes = int(node.max()) + 1
    inverse = (digits[0] << 20) | (digits[1] << 10) | digits[2]
    last = (digits[3] << 20) | (digits[4] << 10) | digits[5]
    return (_GREATEST - inverse).int().view(torch.float32), last


def top_k_norms(table: TensorTable, thresholds: Tensor, lasts: Tensor, units: Tensor) -> Tensor:
    """Sums of floor(unit * |x - base|) over the k largest elements of every row.

    Args:
        table: Rows of one source and a base.
        thresholds: [rows, k] float32, of `top_k`.
        lasts: [rows, k] int64, of `top_k`.
        units: [rows] float32.

    Returns:
        [rows, k + 1] int64 on the device; the last: over all elements.
    """
    from evomerge.methods.fused import triton_tables

    keys = ((_GREATEST - thresholds.view(torch.int32).long()) << 32) + lasts
    wanted = keys.shape[1]
    sums = torch.zeros(table.rows, _REPLICAS, wanted + 1, dtype=torch.int64, device=table.device)
    constants = {"DEPTH": wanted.bit_length(), "REPLICAS": _REPLICAS, "SOURCES": _types(table)}
    _launch(
        triton_tables.sums_between,
        table,
        keys,
        units.to(table.device, torch.float32),
        sums,
        wanted,
        **constants,
    )
    return sums.sum(1).cumsum(1)


def _counted(
    table: TensorTable,
    level: int,
    children: Sequence[Tensor],
    node_counts: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """[rows, nodes * width] int64: how many elements have each digit of a level at each node."""
    from evomerge.methods.fused import triton_tables

    cells = node_counts[level] * widths[level]
    counts = torch.zeros(table.rows, _REPLICAS, cells, dtype=torch.int32, device=table.device)
    given = [*children, *[counts] * (5 - len(children))]
    numbers = [torch.tensor(x, dtype=torch.int32).to(table.device) for x in (node_counts, widths)]
    constants = {"LEVEL": level, "REPLICAS": _REPLICAS, "SOURCES": _types(table)}
    _launch(triton_tables.count_digits, table, counts, *given, *numbers, **constants)
    return counts.sum(1)


def _before(up_to: Tensor, place: Tensor) -> Tensor:
    """The cumulative counts before places, 0 before the first."""
    return torch.where(place > 0, up_to.gather(1, (place - 1).clamp(min=0)), 0)


def _types(table: TensorTable) -> int:
    """The sources' types, two bits each, the first lowest."""
    return sum(code << 2 * i for i, code in enumerate(table.types[2:]))


def _launch(kernel: Any, table: TensorTable, *arguments: object, **constants: object) -> None:
    """One program for each chunk of _STEPS blocks."""
    chunks = table.blocks(_STEPS * _BLOCK)
    if not chunks.count:
        return
    arrays = (table.addresses(), table.launch_sizes(), chunks.first, chunks.row)
    with torch.cuda.device(table.device) if table.device.type == "cuda" else nullcontext():
        kernel[(chunks.count,)](
            *(*arrays, *arguments),
            **constants,
            BASE=table.types[1],
            ALIGNED=table.is_aligned,
            STEPS=_STEPS,
            BLOCK=_BLOCK,
            **COMPILATION,
        )
