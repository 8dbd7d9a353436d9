"""All rows of a table in one call of the C library (`rows.c`), for tensors on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused import c_library
from evomerge.methods.fused.launch_numbers import LaunchNumbers
from evomerge.methods.fused.spans import parallel_map, pieces
from evomerge.methods.fused.tensor_table import TensorTable

Array = np.ndarray[Any, np.dtype[Any]]
MOST_SOURCES = 64
"""Sources of a row that `rows.c` has room for."""
_LEAST_SPAN = 1 << 18  # elements that are worth a thread of their own


def fits_table(table: TensorTable) -> bool:
    """Whether `write_table` takes a table.

    Args:
        table: Its rows.

    Returns:
        True for tables on the CPU, where the library is.
    """
    return table.device.type == "cpu" and table.width <= MOST_SOURCES and c_library.library() is not None


def write_table(table: TensorTable, numbers: LaunchNumbers) -> Tensor:
    """Merges all rows of a table; see `table_sums.write_sums`.

    Args:
        table: The rows.
        numbers: Of as many rows and sources.

    Returns:
        [rows] int32, nonzero where a result is not finite.
    """
    form, total = numbers.form, int(table.sizes.sum())
    arrays = [
        np.ascontiguousarray(a, kind)
        for a, kind in (
            (table.sizes, np.int64),
            (table.addresses().numpy(), np.int64),
            (table.rank_addresses().numpy(), np.int64),
            (np.array(table.types), np.int32),
        )
    ]
    given = [numbers.floats, numbers.integers, numbers.totals]

    def piece(start: int, stop: int) -> Array:
        flags = np.zeros(table.rows, np.int32)
        failed = c_library.functions().sweep_rows(
            ctypes.c_int64(table.rows),
            table.width,
            ctypes.c_int64(start),
            ctypes.c_int64(stop),
            *(_address(a) for a in arrays),
            *(int(table.bases is not None), int(form.kind), int(form.is_bounded)),
            *(int(form.elect_sign), int(form.division)),
            *(_address(a) for a in given),
            _address(flags),
        )
        if failed:
            raise MemoryError("no memory for a block of elements")
        return flags

    span = max(_LEAST_SPAN, -(-total // torch.get_num_threads()))
    parts = parallel_map(pieces(total, span), piece)
    flags = np.bitwise_or.reduce(parts) if parts else np.zeros(table.rows, np.int32)
    return torch.from_numpy(flags)


def _address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
