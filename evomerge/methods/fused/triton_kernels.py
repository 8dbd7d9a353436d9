"""The kernels in Triton, for tensors on a CUDA device: a table of tensors in one launch, with a CPU's bits.

Optional: without Triton, on devices that it is not for, and for tensors that its kernels do not take,
everything is done in torch. Triton is imported when it is first needed. With TRITON_INTERPRET=1 its
interpreter runs the kernels on tensors of the CPU, for tests. What a device does well by torch's sorts and
counts (ranks) is left to `torch_kernels`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from evomerge.methods.fused import device_tables, torch_kernels
from evomerge.methods.fused.launch_numbers import SCALE, LaunchNumbers, SumForm, keeps_nothing
from evomerge.methods.fused.tensor_table import MOST_ELEMENTS, TYPE_CODES, TensorTable
from evomerge.methods.fused.torch_kernels import (
    projections,
    rank_rows,
)
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, WeightedSum

__all__ = [
    "fits",
    "hash_sums",
    "l1_norms",
    "largest",
    "name",
    "product_sums",
    "projections",
    "rank_rows",
    "top_k_sums",
    "top_k_table",
    "write_sum",
]

Array = np.ndarray[Any, np.dtype[Any]]
log = logging.getLogger(__name__)
name = "Triton"
MOST_SOURCES = 8
"""Sources of a sum that fit the registers of a program."""
_LEAST_VERSION = Version("3.6")  # 3.4 flushes subnormal numbers to zero as it divides
_LEAST_CAPABILITY = (8, 0)  # rounds to bfloat16 itself
_STEPS = 8  # blocks of a chunk of norms
COMPILATION = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch: a multiply-add that is fused rounds once where a CPU rounds twice."""


def fits(tensors: Sequence[Tensor | None], summands: Sequence[Summand] = ()) -> bool:
    """See `KernelBackend.fits`: CUDA tensors of 16 and 32 bits, one kind of mask, ranks of 16 bits."""
    there = [t for t in tensors if t is not None]
    return (
        len(there) <= MOST_SOURCES + 2
        and all(_is_readable(t) for t in there)
        and _takes_masks(summands)
        and all(runs_on(device) for device in {t.device for t in there})
    )


def fits_table(table: TensorTable) -> bool:
    """Whether `write_table` takes a table.

    Args:
        table: Its rows.

    Returns:
        True where every row gets the reference's bits.
    """
    return table.width <= MOST_SOURCES and runs_on(table.device)


def write_table(table: TensorTable, numbers: LaunchNumbers, units: Tensor | None = None) -> Tensor:
    """Merges all rows of a table in one launch; see `table_sums.write_sums`.

    Args:
        table: The rows.
        numbers: Of as many rows and sources.
        units: [rows, sources] float32, or None.

    Returns:
        [rows] int32 on the device, nonzero where a result is not finite; nothing waits for the device.
    """
    from evomerge.methods.fused import triton_sums

    form = numbers.form
    flags = torch.zeros(table.rows, dtype=torch.int32, device=table.device)
    floats, integers, totals = numbers.on_device(table.device)
    if units is not None:
        form = replace(form, is_scaled=True)
        sums = norm_sums(table, numbers, units).double()
        floats[..., SCALE] = scales(sums[..., 0], sums[..., 1], units.to(table.device).double())
    blocks = table.blocks(_block_size(table.width))
    arrays = (table.addresses(), table.rank_addresses(), table.launch_sizes(), blocks.first, blocks.row)
    if blocks.count:
        with _on(table.device):
            triton_sums.merge[(blocks.count,)](
                *(*arrays, floats, integers, totals, flags),
                **_mask_constants(table, form),
                ELECT=form.elect_sign,
                DIVISION=int(form.division),
                SCALED=form.is_scaled,
                BASED=table.bases is not None,
                OUT=table.types[0],
                NATIVE=not is_interpreted(),
                **COMPILATION,
            )
    return flags


def norm_sums(table: TensorTable, numbers: LaunchNumbers, units: Tensor) -> Tensor:
    """Norms of every row's differences, in one launch.

    Args:
        table: Rows with a base.
        numbers: Their masks.
        units: [rows, sources] float32.

    Returns:
        [rows, sources, 2] int64 on the device: the sums of `KernelBackend.l1_norms`.
    """
    from evomerge.methods.fused import triton_sums

    sums = torch.zeros(table.rows, table.width, 2, dtype=torch.int64, device=table.device)
    floats, integers, _ = numbers.on_device(table.device)
    blocks = table.blocks(_STEPS * _block_size(table.width))
    arrays = (table.addresses(), table.rank_addresses(), table.launch_sizes(), blocks.first, blocks.row)
    if blocks.count:
        with _on(table.device):
            triton_sums.norms[(blocks.count,)](
                *(*arrays, floats, integers, units.to(table.device, torch.float32), sums),
                **_mask_constants(table, numbers.form),
                STEPS=_STEPS,
                **COMPILATION,
            )
    return sums


def scales(wholes: Tensor, lefts: Tensor, units: Tensor) -> Tensor:
    """The factors of `MagnitudeTables.scale`, computed where the norms lie.

    Args:
        wholes: float64 norms of whole differences.
        lefts: float64 norms of what masks keep.
        units: float64 units of both.

    Returns:
        float32 of the same shape: wholes / lefts, 1 where either is below 1e-7.
    """
    is_small = (wholes < 1e-7 * units) | (lefts < 1e-7 * units)
    return torch.where(is_small, 1.0, wholes / torch.where(is_small, 1.0, lefts)).float()


def write_sum(base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor) -> bool:
    """See `KernelBackend.write_sum`: a table of one row."""
    bases = None if base is None else [base]
    table = TensorTable([out], bases, [sources], ranks=[[s.ranks for s in total.summands]])
    return not bool(write_table(table, LaunchNumbers.of([total])).any())


def l1_norms(base: Tensor, source: Tensor, summand: Summand, unit: float) -> tuple[float, float]:
    """See `KernelBackend.l1_norms`."""
    table = TensorTable([base], [base], [[source]], ranks=[[summand.ranks]])
    numbers = LaunchNumbers.of([WeightedSum((replace(summand, scale=1.0),))])
    whole, left = norm_sums(table, numbers, torch.full((1, 1), unit)).view(-1).tolist()
    return float(whole), 0.0 if keeps_nothing(summand) else float(left)


def largest(base: Tensor | None, sources: Sequence[Tensor]) -> list[float]:
    """See `KernelBackend.largest`."""
    found: list[float] = device_tables.largest(_row(base, sources)).view(-1).tolist()
    return found


def product_sums(
    base: Tensor | None,
    sources: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    exponents: Sequence[int],
) -> list[int]:
    """See `KernelBackend.product_sums`."""
    return device_tables.product_sums(_row(base, sources), pairs, [exponents])[0]


def hash_sums(base: Tensor, source: Tensor, key: tuple[int, int], unit: float, grid: int) -> Array:
    """See `KernelBackend.hash_sums`."""
    sums = device_tables.hash_sums(_row(base, [source]), [key], torch.tensor([unit]), grid)
    found: Array = sums[0].double().cpu().numpy()
    return found


def top_k_table(base: Tensor, source: Tensor, counts: Sequence[int]) -> tuple[Array, Array]:
    """See `KernelBackend.top_k_table`: by a radix descent on the device."""
    thresholds, lasts = device_tables.top_k(_row(base, [source]), np.array([counts], np.int64))
    return thresholds[0].cpu().numpy(), lasts[0].cpu().numpy()


def top_k_sums(
    base: Tensor, source: Tensor, unit: float, counts: Sequence[int], thresholds: Array, lasts: Array
) -> Array:
    """See `KernelBackend.top_k_sums`."""
    known = [torch.from_numpy(each)[None].to(base.device) for each in (thresholds, lasts)]
    sums = device_tables.top_k_norms(_row(base, [source]), known[0], known[1], torch.tensor([unit]))
    norms: Array = sums[0, :-1].double().cpu().numpy()
    return norms


@functools.cache
def is_available() -> bool:
    """Whether Triton is there, not too old, and wanted; AMD's is untried."""
    if os.environ.get("EVOMERGE_NATIVE", "1") == "0" or torch.version.hip is not None:
        return False
    installed = _installed()
    if installed is None:
        return False
    if installed < _LEAST_VERSION:
        log.info("Triton %s is older than %s: merging in torch on GPUs", installed, _LEAST_VERSION)
    return installed >= _LEAST_VERSION


def _installed() -> Version | None:
    """Triton's version, without loading it; nightly builds of torch bring it under a name of their own."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton"):
        with suppress(metadata.PackageNotFoundError):
            return Version(metadata.version(distribution))
    return None


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, in this process from its start."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device, so that a table is merged in one launch.

    Args:
        device: Any.

    Returns:
        True for a CUDA device that is new enough; for the CPU under Triton's interpreter.
    """
    if not is_available():
        return False
    if device.type != "cuda":
        return is_interpreted() and device.type == "cpu"
    is_new = torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    return is_new and not is_interpreted() and gives_the_reference_s_bits(device)


def gives_the_reference_s_bits(device: torch.device) -> bool:
    """Launches a small sum once: Triton needs a C compiler as it first launches, and a driver that it knows.

    Args:
        device: Where.

    Returns:
        Whether it ran and has the bits of torch's kernels; the log says what was wrong.
    """
    try:
        x = torch.linspace(-3, 3, 100, device=device)
        is_right = all(_is_right(scale * x) for scale in (1.0, 2.0**-128))  # subnormal numbers too
    except Exception as error:  # whatever a driver, a compiler or a linker says
        log.warning("Triton does not run on %s, merging in torch there: %s", device, error)
        return False
    if not is_right:
        log.warning("Triton's sums on %s are not those of torch: merging in torch there", device)
    return is_right


def _row(base: Tensor | None, sources: Sequence[Tensor]) -> TensorTable:
    """A table of one row that is only read."""
    bases = None if base is None else [base]
    return TensorTable([sources[0]], bases, [sources])


def _is_right(x: Tensor) -> bool:
    """Whether a sum with divisions of a few numbers has the bits of torch's kernels."""
    sources = [x * 2, x * x, -x]
    total = WeightedSum(tuple(Summand(MaskKind.DENSE, w) for w in (0.3, 0.7, 0.9)), True, None)
    out, want = torch.empty_like(x), torch.empty_like(x)
    is_finite = write_sum(x, sources, total, out)
    return is_finite == torch_kernels.write_sum(x, sources, total, want) and torch.equal(out, want)


def _is_readable(tensor: Tensor) -> bool:
    return tensor.dtype in TYPE_CODES and tensor.is_contiguous() and tensor.numel() <= MOST_ELEMENTS


def _takes_masks(summands: Sequence[Summand]) -> bool:
    short_ranks = all(s.ranks is None or s.ranks.dtype == torch.uint16 for s in summands)
    return short_ranks and (not summands or SumForm.of([WeightedSum(tuple(summands))]) is not None)


def _block_size(sources: int) -> int:
    """Elements of a block: what a program's registers hold."""
    return 2048 if sources <= 4 else 1024


def _mask_constants(table: TensorTable, form: SumForm) -> dict[str, Any]:
    """What is compiled into the kernels that apply masks."""
    return {
        "N": table.width,
        "KIND": int(form.kind),
        "BOUNDED": form.is_bounded,
        "BASE": table.types[1],
        "SOURCES": sum(code << 2 * i for i, code in enumerate(table.types[2:])),
        "ALIGNED": table.is_aligned,
        "BLOCK": _block_size(table.width),
    }


def _on(device: torch.device) -> Any:
    """The device as the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
