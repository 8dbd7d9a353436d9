"""Triton kernels for sums of task vectors: all tensors of a model in one launch over a table.

Every float operation is one IEEE operation on float32, in the order of `torch_kernels`: launch with
enable_fp_fusion=False (no multiply-add), and divide by `tl.div_rn` (`/` is approximate in Triton). The arrays
are those of `tensor_table.TensorTable` and `launch_numbers.LaunchNumbers`. Imported only where Triton is.
"""

import triton
import triton.language as tl

from evomerge.methods.fused import launch_numbers
from evomerge.methods.fused.triton_elements import (
    hashed,
    least_infinite,
    magnitude_bits,
    mixed,
    read,
    typed_pointer,
    write,
)
from evomerge.methods.fused.weighted_sum import MaskKind

BAND = tl.constexpr(int(MaskKind.BAND))
RANDOM = tl.constexpr(int(MaskKind.RANDOM))
RANKED = tl.constexpr(int(MaskKind.RANKED))
NUMBER = tl.constexpr(int(launch_numbers.Division.NUMBER))
AGREEING = tl.constexpr(int(launch_numbers.Division.AGREEING))
FLOATS = tl.constexpr(launch_numbers.FLOATS)
WEIGHT = tl.constexpr(launch_numbers.WEIGHT)
SCALE = tl.constexpr(launch_numbers.SCALE)
LOW = tl.constexpr(launch_numbers.LOW)
HIGH = tl.constexpr(launch_numbers.HIGH)
P_LOW = tl.constexpr(launch_numbers.P_LOW)
P_STEP = tl.constexpr(launch_numbers.P_STEP)
INTEGERS = tl.constexpr(launch_numbers.INTEGERS)
KEY = tl.constexpr(launch_numbers.KEY)
ODD = tl.constexpr(launch_numbers.ODD)
BOUND = tl.constexpr(launch_numbers.BOUND)
LAST = tl.constexpr(launch_numbers.LAST)
HIGH_LAST = tl.constexpr(launch_numbers.HIGH_LAST)
TOTALS = tl.constexpr(launch_numbers.TOTALS)
DIVISOR = tl.constexpr(launch_numbers.DIVISOR)
FACTOR = tl.constexpr(launch_numbers.FACTOR)
UINT16 = tl.constexpr(1)  # ranks are read as bfloat16 is: by 16-bit integers


@triton.jit
def merge(
    addresses, ranks, sizes, first_blocks, block_rows, floats, integers, totals, flags, N: tl.constexpr,
    KIND: tl.constexpr, ELECT: tl.constexpr, DIVISION: tl.constexpr, SCALED: tl.constexpr,
    BOUNDED: tl.constexpr, BASED: tl.constexpr, OUT: tl.constexpr, BASE: tl.constexpr,
    SOURCES: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one block of one row: base + factor * sum / divisor.

    Args:
        addresses: [rows, N + 2] int64: output, base, sources.
        ranks: [rows, N] int64: addresses of uint16 ranks.
        sizes: [rows] int32.
        first_blocks: [rows] int32: number of each row's first block.
        block_rows: [blocks] int32: row of each block.
        floats: [rows, N, 8] float32.
        integers: [rows, N, 5] int32.
        totals: [rows, 2] float32: divisor, factor.
        flags: [rows] int32: gets a 1 where a result is not finite.
        N: Number of sources.
        KIND: Of all masks.
        ELECT: Whether only summands with the sign of the sum are summed.
        DIVISION: By nothing, by the row's divisor or by the weights that agree.
        SCALED: Whether scales are applied.
        BOUNDED: Whether bands have an upper bound.
        BASED: Whether there is a base.
        OUT: Type of the outputs.
        BASE: Type of the bases.
        SOURCES: Types of the sources, two bits each, the first lowest.
        ALIGNED: Whether addresses are multiples of 16 bytes and sizes of 16 elements.
        NATIVE: See `triton_elements.write`.
        BLOCK: Elements of a block.

    Returns:
        Nothing: it writes to memory.
    """
    block = tl.program_id(0)
    row = tl.load(block_rows + block)
    start = (block - tl.load(first_blocks + row)) * BLOCK
    size = tl.load(sizes + row)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    addresses += row * (N + 2)
    ranks += row * N
    floats += row * (N * FLOATS)
    integers += row * (N * INTEGERS)
    totals += row * TOTALS
    index = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    inside = index < size
    is_cut = False  # whether a threshold changes inside this block
    if KIND == BAND:
        for i in tl.static_range(N):
            is_cut = is_cut | _is_between(tl.load(integers + i * INTEGERS + LAST), start, BLOCK)
            if BOUNDED:
                is_cut = is_cut | _is_between(tl.load(integers + i * INTEGERS + HIGH_LAST), start, BLOCK)
    if KIND == BAND:
        if is_cut:
            result = _sum(
                addresses, ranks, floats, integers, totals, start, index, inside, N, KIND, ELECT,
                DIVISION, SCALED, BOUNDED, BASED, BASE, SOURCES, ALIGNED, BLOCK, True,
            )  # fmt: skip
        else:
            result = _sum(
                addresses, ranks, floats, integers, totals, start, index, inside, N, KIND, ELECT,
                DIVISION, SCALED, BOUNDED, BASED, BASE, SOURCES, ALIGNED, BLOCK, False,
            )  # fmt: skip
    else:
        result = _sum(
            addresses, ranks, floats, integers, totals, start, index, inside, N, KIND, ELECT,
            DIVISION, SCALED, BOUNDED, BASED, BASE, SOURCES, ALIGNED, BLOCK, False,
        )  # fmt: skip
    write(addresses, index, inside, result, OUT, ALIGNED, NATIVE)
    largest = tl.max(tl.where(inside, magnitude_bits(result), 0), 0)
    tl.store(flags + row, 1, mask=largest >= least_infinite(OUT))


@triton.jit
def _is_between(last, start, BLOCK: tl.constexpr):
    """Whether an index is in a block, but not its last element."""
    return (start <= last) & (last < start + BLOCK - 1)


@triton.jit
def _sum(
    addresses, ranks, floats, integers, totals, start, index, inside, N: tl.constexpr,
    KIND: tl.constexpr, ELECT: tl.constexpr, DIVISION: tl.constexpr, SCALED: tl.constexpr,
    BOUNDED: tl.constexpr, BASED: tl.constexpr, BASE: tl.constexpr, SOURCES: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The result of one block in float32; arguments as of `merge`, those of rows at the row."""
    b = tl.zeros([BLOCK], tl.float32)
    if BASED:
        b = read(addresses + 1, index, inside, BASE, ALIGNED)
    mixed_index = mixed(index)
    terms = ()
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(N):
        d = read(addresses + 2 + i, index, inside, (SOURCES >> (2 * i)) & 3, ALIGNED)
        if BASED:
            d = d - b
        d = _kept(
            d, start, index, inside, mixed_index, floats + i * FLOATS, integers + i * INTEGERS,
            ranks + i, KIND, BOUNDED, ALIGNED, CUT,
        )  # fmt: skip
        if SCALED:
            d = d * tl.load(floats + i * FLOATS + SCALE)
        term = d * tl.load(floats + i * FLOATS + WEIGHT)
        terms = terms + (term,)  # noqa: RUF005
        total = total + term
    if ELECT:
        sign = tl.where(total >= 0, 1.0, -1.0)
        total = tl.zeros([BLOCK], tl.float32)
        weight = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(N):
            agreeing = terms[i] * sign
            total = total + tl.maximum(agreeing, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if DIVISION == AGREEING:
                weight = tl.where(agreeing > 0, weight + tl.load(floats + i * FLOATS + WEIGHT), weight)
        total = total * sign
        if DIVISION == AGREEING:
            total = tl.div_rn(total, tl.where(tl.abs(weight) < 1e-6, 1.0, weight))
    if DIVISION == NUMBER:
        total = tl.div_rn(total, tl.load(totals + DIVISOR))
    return b + total * tl.load(totals + FACTOR)


@triton.jit
def _kept(
    d, start, index, inside, mixed_index, floats, integers, rank, KIND: tl.constexpr,
    BOUNDED: tl.constexpr, ALIGNED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Those of the differences `d` that a source's mask keeps, zero elsewhere.

    `floats`, `integers` and `rank` are at the source; CUT: a threshold changes inside this block.
    """
    if KIND == BAND:
        least = _threshold(floats + LOW, integers + LAST, start, index, CUT)
        dropped = tl.abs(d) < least
        if BOUNDED:
            upper = _threshold(floats + HIGH, integers + HIGH_LAST, start, index, CUT)
            dropped = dropped | (tl.abs(d) >= upper)
        d = tl.where(dropped, 0.0, d)
    elif KIND == RANDOM:
        hashes = _hashes(mixed_index, integers)
        d = tl.where(hashes <= tl.load(integers + BOUND), d, 0.0)
    elif KIND == RANKED:
        hashes = _hashes(mixed_index, integers)
        ranks = tl.load(typed_pointer(rank, UINT16, ALIGNED) + index, mask=inside, other=0)
        probability = ranks.to(tl.float32) * tl.load(floats + P_STEP) + tl.load(floats + P_LOW)
        d = tl.where(hashes.to(tl.float32) < probability * 4294967296.0 - 2147483648.0, d, 0.0)
    return d


@triton.jit
def _hashes(mixed_index, integers):
    """Hashes of mixed indices with a source's key, int32."""
    hashes = hashed(mixed_index, tl.load(integers + KEY), tl.load(integers + ODD))
    return hashes.to(tl.int32, bitcast=True)


@triton.jit
def _threshold(floats, last, start, index, CUT: tl.constexpr):
    """A threshold and the one after it, at floats and floats + 1; the first holds up to index `last`."""
    if CUT:
        threshold = tl.where(index <= tl.load(last), tl.load(floats), tl.load(floats + 1))
    else:
        threshold = tl.load(floats + tl.where(start <= tl.load(last), 0, 1))
    return threshold


@triton.jit
def norms(
    addresses, ranks, sizes, first_blocks, block_rows, floats, integers, units, sums, N: tl.constexpr,
    KIND: tl.constexpr, BOUNDED: tl.constexpr, BASE: tl.constexpr, SOURCES: tl.constexpr,
    ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up floor(unit * |x - base|) of one chunk of STEPS blocks of a row, for each source.

    Args:
        addresses: As of `merge`.
        ranks: As of `merge`.
        sizes: As of `merge`.
        first_blocks: [rows] int32: number of each row's first chunk.
        block_rows: [chunks] int32: row of each chunk.
        floats: As of `merge`.
        integers: As of `merge`.
        units: [rows, N] float32.
        sums: [rows, N, 2] int64, added to: over all elements, over those that the mask keeps.
        N: Number of sources.
        KIND: Of all masks.
        BOUNDED: Whether bands have an upper bound.
        BASE: Type of the bases.
        SOURCES: Types of the sources.
        ALIGNED: As of `merge`.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block.

    Returns:
        Nothing: it writes to memory.
    """
    chunk = tl.program_id(0)
    row = tl.load(block_rows + chunk)
    first = (chunk - tl.load(first_blocks + row)) * (STEPS * BLOCK)
    size = tl.load(sizes + row)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    addresses += row * (N + 2)
    for i in tl.static_range(N):
        source = row * N + i
        unit = tl.load(units + source)
        whole = tl.zeros([BLOCK], tl.int64)
        left = tl.zeros([BLOCK], tl.int64)
        for step in range(tl.cdiv(tl.minimum(size - first, STEPS * BLOCK), BLOCK)):
            start = tl.multiple_of(first + step * BLOCK, BLOCK)
            index = start + tl.arange(0, BLOCK)
            inside = index < size
            d = read(addresses + 2 + i, index, inside, (SOURCES >> (2 * i)) & 3, ALIGNED)
            d = d - read(addresses + 1, index, inside, BASE, ALIGNED)
            whole += _whole_units(d, unit)
            kept = _kept(
                d, start, index, inside, mixed(index), floats + source * FLOATS,
                integers + source * INTEGERS, ranks + source, KIND, BOUNDED, ALIGNED, True,
            )  # fmt: skip
            left += _whole_units(kept, unit)
        tl.atomic_add(sums + source * 2, tl.sum(whole, 0), sem="relaxed")
        tl.atomic_add(sums + source * 2 + 1, tl.sum(left, 0), sem="relaxed")


@triton.jit
def _whole_units(d, unit):
    """floor(unit * |d|) as int64."""
    return (tl.abs(d) * unit).to(tl.int64)
