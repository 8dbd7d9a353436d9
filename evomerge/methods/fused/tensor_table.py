"""A table of the tensors that one launch merges: where each lies, its size and its blocks.

A table is made once for a shape of recipe: which tensors of which models make which outputs. The numbers of a
candidate (`launch_numbers.LaunchNumbers`) are written beside it for each merge, and `table_sums.write_sums`
merges every row.

    table = TensorTable(outs, bases, [[x.view[name] for x in parents] for name in names], is_padded=True)
    flags = write_sums(table, LaunchNumbers.of(weighted_sums))  # [rows], nonzero where not finite
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
PADDING = 16
"""Elements that sizes are rounded up to in padded tables, so that masks do not split 16-byte accesses."""
ALIGNMENT = 16
"""Bytes: addresses of an aligned table are multiples of it."""
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types that kernels over a table take, with the numbers of `one_pass.c`."""
MOST_ELEMENTS = (1 << 31) - 2 * PADDING
"""Largest size of a tensor of a table: indices are signed 32-bit numbers."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks that the rows of a table are cut into, for a launch of one program each.

    Attributes:
        first: [rows] int32 on the table's device: number of each row's first block.
        row: [count] int32 on the table's device: the row of each block.
        count: Number of blocks.
    """

    first: Tensor
    row: Tensor
    count: int


def row_layout(
    out: Tensor, base: Tensor | None, sources: Sequence[Tensor], *, is_padded: bool = False
) -> Hashable:
    """What to group rows by: those of equal layouts fit one table, and none of them slows the others down.

    Args:
        out: Where the row is written.
        base: None for a sum of the sources themselves.
        sources: One tensor per source.
        is_padded: As for `TensorTable`.

    Returns:
        Types, number of sources, device, whether there is a base, and whether 16-byte accesses are possible
        (the one thing that may differ within a table: then no row has them).
    """
    tensors = [out, *([] if base is None else [base]), *sources]
    return _common(out, base, sources), _is_aligned(tensors, is_padded=is_padded)


class TensorTable:
    """Rows of tensors: in each an output, a base (in all rows or in none) and the same number of sources.

    All tensors are contiguous, on one device, and of one size within a row. Types are the same in all rows.
    The table keeps the tensors alive; it must be made anew where one of them moves.

    Attributes:
        outs: [rows] tensors that are written.
        bases: [rows] tensors, or None.
        sources: [rows][sources] tensors.
        ranks: [rows][sources] uint16 tensors of the row's size or None: ranks for RANKED masks, see
            `MagnitudeTables.ranks`; None for tables without such masks. On a device readable up to a
            multiple of PADDING elements where the table is padded.
        sizes: [rows] int64, number of elements of each row.
        types: Type codes of the output, of the base (of the output where there is none), of each source.
        is_padded: Whether every tensor may be read, and every output written, up to the next multiple of
            PADDING elements.
        is_aligned: Whether 16-byte accesses are possible: addresses and sizes allow it.
    """

    def __init__(
        self,
        outs: Sequence[Tensor],
        bases: Sequence[Tensor] | None,
        sources: Sequence[Sequence[Tensor]],
        *,
        ranks: Sequence[Sequence[Tensor | None]] | None = None,
        is_padded: bool = False,
    ) -> None:
        """A table of these tensors.

        Args:
            outs: [rows], at least one.
            bases: [rows] or None.
            sources: [rows][sources].
            ranks: [rows][sources] or None.
            is_padded: The caller says that every tensor ends at, or is followed by room up to, a multiple of
                PADDING elements, which nothing else uses and which holds zeros (tensors of an arena do).

        Raises:
            ValueError: The rows differ in layout, or a tensor is not contiguous, of another size than its
                row, or beyond MOST_ELEMENTS.
        """
        self.outs, self.bases = tuple(outs), None if bases is None else tuple(bases)
        self.sources = tuple(tuple(row) for row in sources)
        self.ranks = None if ranks is None else tuple(tuple(row) for row in ranks)
        self.is_padded = is_padded
        self.device = self.outs[0].device
        self.sizes: Array = np.array([t.numel() for t in self.outs], np.int64)
        rows = range(self.rows)
        for row in rows:
            _check_row(row, self._tensors(row), int(self.sizes[row]))
        layouts = {_common(*self._row(row)) for row in rows}
        if len(layouts) != 1:
            raise ValueError(f"the rows of a table have {len(layouts)} layouts: make a table of each")
        first = self.outs[0] if self.bases is None else self.bases[0]
        self.types = tuple(TYPE_CODES[t.dtype] for t in (self.outs[0], first, *self.sources[0]))
        self.is_aligned = all(_is_aligned(self._tensors(row), is_padded=is_padded) for row in rows)
        self._blocks: dict[int, Blocks] = {}
        self._on_device: dict[str, Tensor] = {}

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.outs)

    @property
    def width(self) -> int:
        """Number of sources of a row."""
        return len(self.sources[0])

    def addresses(self) -> Tensor:
        """[rows, width + 2] int64 on the device: addresses of output, base (output if none) and sources."""
        firsts = self.outs if self.bases is None else self.bases
        rows = zip(self.outs, firsts, self.sources, strict=True)
        return self._cached("addresses", lambda: [[t.data_ptr() for t in (o, b, *xs)] for o, b, xs in rows])

    def rank_addresses(self) -> Tensor:
        """[rows, width] int64 on the device: addresses of ranks, or of the output where there are none."""

        def addresses() -> list[list[int]]:
            ranks = self.ranks or [[None] * self.width] * self.rows
            rows = zip(self.outs, ranks, strict=True)
            return [[(out if t is None else t).data_ptr() for t in row] for out, row in rows]

        return self._cached("ranks", addresses)

    def lacks_ranks(self) -> Array:
        """[rows, width] bool: where there are no ranks."""
        ranks = self.ranks or [[None] * self.width] * self.rows
        return np.array([[t is None for t in row] for row in ranks])

    def launch_sizes(self) -> Tensor:
        """[rows] int32 on the device: elements that a launch covers, rounded up to PADDING where padded."""
        step = PADDING if self.is_padded else 1
        return self._cached("sizes", lambda: -(-self.sizes // step) * step, torch.int32)

    def blocks(self, elements: int) -> Blocks:
        """The rows cut into blocks; computed once for each size.

        Args:
            elements: Most elements of a block.

        Returns:
            The blocks, row after row; none for empty tensors.
        """
        if elements not in self._blocks:
            counts = -(-self.sizes // elements)
            first = (np.cumsum(counts) - counts).astype(np.int32)
            row = np.repeat(np.arange(self.rows, dtype=np.int32), counts)
            on_device = [torch.from_numpy(a).to(self.device) for a in (first, row)]
            self._blocks[elements] = Blocks(on_device[0], on_device[1], len(row))
        return self._blocks[elements]

    def _row(self, i: int) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        return self.outs[i], None if self.bases is None else self.bases[i], self.sources[i]

    def _tensors(self, row: int) -> list[Tensor]:
        out, base, sources = self._row(row)
        return [out, *([] if base is None else [base]), *sources]

    def _cached(self, name: str, numbers: Callable[[], object], dtype: torch.dtype = torch.int64) -> Tensor:
        if name not in self._on_device:
            self._on_device[name] = torch.as_tensor(numbers(), dtype=dtype).to(self.device)
        return self._on_device[name]


def _common(out: Tensor, base: Tensor | None, sources: Sequence[Tensor]) -> Hashable:
    """Types and number of a row's tensors, their device, and whether there is a base."""
    types = tuple(TYPE_CODES[t.dtype] for t in (out, *([] if base is None else [base]), *sources))
    return types, base is not None, out.device


def _check_row(row: int, tensors: Sequence[Tensor], size: int) -> None:
    if size > MOST_ELEMENTS:
        raise ValueError(f"row {row} has {size} elements, of at most {MOST_ELEMENTS}")
    for tensor in tensors:
        if tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"row {row}: a tensor of {tensor.numel()} elements"
                f"{'' if tensor.is_contiguous() else ', not contiguous,'} in a row of {size}"
            )


def _is_aligned(tensors: Sequence[Tensor], *, is_padded: bool) -> bool:
    """Whether 16-byte accesses are possible for tensors of one row."""
    starts = all(t.data_ptr() % ALIGNMENT == 0 for t in tensors)
    return starts and (is_padded or tensors[0].numel() % PADDING == 0)
