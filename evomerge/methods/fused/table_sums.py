"""Merges all rows of a `TensorTable`: in one launch by Triton, in one call in C or row by row; equal bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from evomerge.methods.fused import c_library, c_rows, one_pass, triton_kernels
from evomerge.methods.fused.launch_numbers import P_STEP, SCALE, LaunchNumbers
from evomerge.methods.fused.tensor_table import TensorTable
from evomerge.methods.fused.weighted_sum import MaskKind


def is_one_call(device: torch.device) -> bool:
    """Whether the rows of a table are merged at once on a device, and not one after the other in Python.

    Args:
        device: Any.

    Returns:
        True where Triton runs, and on the CPU where the C library is.
    """
    return triton_kernels.runs_on(device) or (device.type == "cpu" and c_library.library() is not None)


def write_sums(table: TensorTable, numbers: LaunchNumbers, units: Tensor | None = None) -> Tensor:
    """Writes base + factor * sum / divisor into the output of every row.

    Args:
        table: The rows.
        numbers: Of as many rows and sources.
        units: [rows, sources] float32, units of norms, see `MagnitudeTables.unit`. Given them, the scales of
            `numbers` are replaced by the factors that restore the norms of the whole differences, as
            `MagnitudeTables.scale` computes them: for masks whose norms no table holds, at the price of one
            more reading pass.

    Returns:
        [rows] int32 on the table's device: nonzero where a result is not finite. The device need not be done
        when this returns; reading the flags waits for it.

    Raises:
        ValueError: The numbers are of other rows or sources, or want ranks that the table has not.
    """
    _check(table, numbers)
    if triton_kernels.fits_table(table):
        return triton_kernels.write_table(table, numbers, units)
    if units is not None:
        numbers = _rescaled(table, numbers, units)
    return c_rows.write_table(table, numbers) if c_rows.fits_table(table) else _row_by_row(table, numbers)


def _check(table: TensorTable, numbers: LaunchNumbers) -> None:
    """Refuses numbers by which a kernel would read what is not there."""
    if numbers.floats.shape[:2] != (table.rows, table.width):
        raise ValueError(
            f"the numbers of {numbers.floats.shape[:2]} rows and sources do not fit a table of "
            f"{(table.rows, table.width)}"
        )
    kind = numbers.form.kind
    if kind is not MaskKind.DENSE and table.bases is None:
        raise ValueError("masks are of differences from a base, and the table has no bases")
    if kind is MaskKind.RANKED and (table.lacks_ranks() & (numbers.floats[..., P_STEP] != 0)).any():
        raise ValueError("masks by rank need the ranks of their sources in the table")


def _row_by_row(table: TensorTable, numbers: LaunchNumbers) -> Tensor:
    bases = table.bases or [None] * table.rows
    ranks = table.ranks or [None] * table.rows
    flags = []
    for row, (out, base, sources) in enumerate(zip(table.outs, bases, table.sources, strict=True)):
        total = numbers.weighted_sum(row, ranks[row])
        flags.append(int(not one_pass.write_sum(base, sources, total, out)))
    return torch.tensor(flags, dtype=torch.int32, device=table.device)


def _rescaled(table: TensorTable, numbers: LaunchNumbers, units: Tensor) -> LaunchNumbers:
    """The numbers with scales that restore norms, by one pass over each source."""
    assert table.bases is not None
    ranks = table.ranks or [None] * table.rows
    floats = numbers.floats.copy()
    for row, (base, sources) in enumerate(zip(table.bases, table.sources, strict=True)):
        for i, summand in enumerate(numbers.weighted_sum(row, ranks[row]).summands):
            unit = float(units[row, i])
            whole, left = one_pass.l1_norms(base, sources[i], summand, unit)
            is_small = whole < 1e-7 * unit or left < 1e-7 * unit
            floats[row, i, SCALE] = 1.0 if is_small else np.float32(whole / left)
    return replace(numbers, form=replace(numbers.form, is_scaled=True), floats=floats)
