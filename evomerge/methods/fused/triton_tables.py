"""Triton kernels for what a search measures once: largest magnitudes, thresholds, norms, dot products.

Rows are those of a `tensor_table.TensorTable`; a program takes a chunk of several blocks of one row. All sums
are of whole numbers, so that the order of atomic additions changes nothing. Counters and sums that many
elements add to have replicas, for additions to one address queue. Imported only where Triton is.
"""

import triton
import triton.language as tl

from evomerge.methods.fused.triton_elements import hashed, magnitude_bits, mixed, read

ROUNDING = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: adding and subtracting it rounds below 2**51
REST = tl.constexpr(1099511627776.0)  # 2**REST_BITS of `exact_products`
GREATEST = tl.constexpr(0x7FFFFFFF)  # of 31 bits: `bits ^ GREATEST` is GREATEST - bits
FIRST_WIDTH = tl.constexpr(2048)  # values of the first digit; of the others 1024
GROUP = tl.constexpr(1024)  # elements whose zeros are counted by one addition


@triton.jit
def _chunk(sizes, first_blocks, block_rows, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """(row of a program, index of its first element, size of the row, how many blocks are its)."""
    chunk = tl.program_id(0)
    row = tl.load(block_rows + chunk)
    first = (chunk - tl.load(first_blocks + row)) * (STEPS * BLOCK)
    size = tl.load(sizes + row)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return row, first, size, tl.cdiv(tl.minimum(size - first, STEPS * BLOCK), BLOCK)


@triton.jit
def _difference(
    row_addresses, i, index, inside, BASED: tl.constexpr, BASE: tl.constexpr, SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """x_i - base as float32; x_i without a base."""
    d = read(row_addresses + 2 + i, index, inside, SOURCE, ALIGNED)
    if BASED:
        d = d - read(row_addresses + 1, index, inside, BASE, ALIGNED)
    return d


@triton.jit
def largest(
    addresses, sizes, first_blocks, block_rows, tops, N: tl.constexpr, BASED: tl.constexpr,
    BASE: tl.constexpr, SOURCES: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the largest |x_i - base| of every source of every row.

    Args:
        addresses: [rows, N + 2] int64: output, base, sources.
        sizes: [rows] int32.
        first_blocks: [rows] int32: number of each row's first chunk.
        block_rows: [chunks] int32: row of each chunk.
        tops: [rows, N] int32, zero before: bits of the largest magnitudes; of NaN where any is.
        N: Number of sources.
        BASED: Whether there is a base.
        BASE: Type of the bases.
        SOURCES: Types of the sources, two bits each, the first lowest.
        ALIGNED: Whether addresses are multiples of 16 bytes and sizes of 16 elements.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block.

    Returns:
        Nothing: it writes to memory.
    """
    row, first, size, steps = _chunk(sizes, first_blocks, block_rows, ALIGNED, STEPS, BLOCK)
    addresses += row * (N + 2)
    for i in tl.static_range(N):
        top = tl.zeros([BLOCK], tl.int32)
        for step in range(steps):
            index = tl.multiple_of(first + step * BLOCK, BLOCK) + tl.arange(0, BLOCK)
            inside = index < size
            d = _difference(addresses, i, index, inside, BASED, BASE, (SOURCES >> (2 * i)) & 3, ALIGNED)
            top = tl.maximum(top, magnitude_bits(d))
        tl.atomic_max(tops + row * N + i, tl.max(top, 0), sem="relaxed")


@triton.jit(do_not_specialize=["width", "a", "b", "product", "products"])
def product_sums(
    addresses, sizes, first_blocks, block_rows, units, sums, width, a, b, product, products,
    TYPE_A: tl.constexpr, TYPE_B: tl.constexpr, BASED: tl.constexpr, BASE: tl.constexpr,
    ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the whole numbers of `exact_products` for one pair of sources of every row.

    Args:
        addresses: [rows, width + 2] int64: output, base, sources.
        sizes: As of `largest`.
        first_blocks: As of `largest`.
        block_rows: As of `largest`.
        units: [rows, products] float64: 2**u.
        sums: [rows, products, 2] int64, added to: total = first * 2**REST_BITS + second.
        width: Number of sources.
        a: Number of the one source.
        b: Number of the other.
        product: Number of the product.
        products: How many there are.
        TYPE_A: Type of the one source.
        TYPE_B: Type of the other.
        BASED: As of `largest`.
        BASE: As of `largest`.
        ALIGNED: As of `largest`.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block; rests of a chunk fit 64 bits for up to 2**23 elements.

    Returns:
        Nothing: it writes to memory.
    """
    row, first, size, steps = _chunk(sizes, first_blocks, block_rows, ALIGNED, STEPS, BLOCK)
    addresses += row * (width + 2)
    place = row * products + product
    unit = tl.load(units + place)
    whole_sum = tl.zeros([BLOCK], tl.int64)
    rest_sum = tl.zeros([BLOCK], tl.int64)
    for step in range(steps):
        index = tl.multiple_of(first + step * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        inside = index < size
        one = _difference(addresses, a, index, inside, BASED, BASE, TYPE_A, ALIGNED)
        other = _difference(addresses, b, index, inside, BASED, BASE, TYPE_B, ALIGNED)
        exact = (one.to(tl.float64) * other.to(tl.float64)) * unit
        whole = (exact + ROUNDING) - ROUNDING
        rest = (exact - whole) * REST
        rest = (rest + ROUNDING) - ROUNDING
        whole_sum += whole.to(tl.int64)
        rest_sum += rest.to(tl.int64)
    rests = tl.sum(rest_sum, 0)
    tl.atomic_add(sums + place * 2, tl.sum(whole_sum, 0) + (rests >> 40), sem="relaxed")
    tl.atomic_add(sums + place * 2 + 1, rests & 0xFFFFFFFFFF, sem="relaxed")


@triton.jit
def hash_sums(
    addresses, sizes, first_blocks, block_rows, keys, units, sums, GRID: tl.constexpr,
    REPLICAS: tl.constexpr, BASE: tl.constexpr, SOURCES: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds floor(unit * |x - base|) of every element of every row to the cell of its hash.

    Args:
        addresses: [rows, 3] int64: output, base, source.
        sizes: As of `largest`.
        first_blocks: As of `largest`.
        block_rows: As of `largest`.
        keys: [rows, 2] int32, see `random_masks.split`.
        units: [rows] float32.
        sums: [rows, REPLICAS, GRID] int64, added to.
        GRID: Number of cells.
        REPLICAS: Of the sums.
        BASE: Type of the bases.
        SOURCES: Type of the sources.
        ALIGNED: As of `largest`.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block.

    Returns:
        Nothing: it writes to memory.
    """
    row, first, size, steps = _chunk(sizes, first_blocks, block_rows, ALIGNED, STEPS, BLOCK)
    addresses += row * 3
    unit = tl.load(units + row)
    sums += (row * REPLICAS + tl.program_id(0) % REPLICAS).to(tl.int64) * GRID
    for step in range(steps):
        index = tl.multiple_of(first + step * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        inside = index < size
        d = _difference(addresses, 0, index, inside, True, BASE, SOURCES, ALIGNED)
        worth = (tl.abs(d) * unit).to(tl.int64)
        hashes = hashed(mixed(index), tl.load(keys + row * 2), tl.load(keys + row * 2 + 1)) ^ 0x80000000
        cell = ((hashes.to(tl.uint64) * GRID) >> 32).to(tl.int32)
        tl.atomic_add(sums + cell, worth, mask=inside & (worth > 0), sem="relaxed")


@triton.jit
def _digit(bits, index, LEVEL: tl.constexpr):
    """A digit of an element's key: largest magnitudes first, of equal ones the lowest index first.

    11, 10 and 10 bits of GREATEST - bits, then of the index.
    """
    part = bits ^ GREATEST if LEVEL < 3 else index
    if LEVEL % 3 == 0:
        part = part >> 20
    elif LEVEL % 3 == 1:
        part = (part >> 10) & 1023
    else:
        part = part & 1023
    return part


@triton.jit
def count_digits(
    addresses, sizes, first_blocks, block_rows, counts, child_0, child_1, child_2, child_3, child_4,
    node_counts, widths, LEVEL: tl.constexpr, REPLICAS: tl.constexpr, BASE: tl.constexpr,
    SOURCES: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the next digit of the elements whose key begins as one that is searched for.

    Nodes of a level are the beginnings of keys that are searched for. Zero differences, most of a light
    fine-tune's, have one key but for the index: they are counted GROUP by GROUP.

    Args:
        addresses: [rows, 3] int64: output, base, source.
        sizes: As of `largest`.
        first_blocks: As of `largest`.
        block_rows: As of `largest`.
        counts: [rows, REPLICAS, nodes of this level, width] int32, added to.
        child_0: [rows, nodes of level 0, width] int32: number of the node that a digit leads to, or -1.
        child_1: The same of level 1; unused arguments may be anything.
        child_2: Of level 2.
        child_3: Of level 3.
        child_4: Of level 4.
        node_counts: [6] int32: nodes of each level.
        widths: [6] int32: values of each level's digit.
        LEVEL: Number of the digit.
        REPLICAS: Of the counts.
        BASE: Type of the bases.
        SOURCES: Type of the sources.
        ALIGNED: As of `largest`.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block, a multiple of GROUP.

    Returns:
        Nothing: it writes to memory.
    """
    row, first, size, steps = _chunk(sizes, first_blocks, block_rows, ALIGNED, STEPS, BLOCK)
    addresses += row * 3
    width = tl.load(widths + LEVEL)
    replica = (row * REPLICAS + tl.program_id(0) % REPLICAS).to(tl.int64)
    counts += replica * tl.load(node_counts + LEVEL) * width
    first_digits = tl.zeros([FIRST_WIDTH], tl.int32)
    for step in range(steps):
        index = tl.multiple_of(first + step * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        inside = index < size
        bits = magnitude_bits(_difference(addresses, 0, index, inside, True, BASE, SOURCES, ALIGNED))
        if LEVEL == 0:
            first_digits += tl.histogram(_digit(bits, index, 0), FIRST_WIDTH, mask=inside)
        else:
            node = tl.zeros([BLOCK], tl.int32)
            for level in tl.static_range(LEVEL):
                if level == 0:
                    child = child_0
                elif level == 1:
                    child = child_1
                elif level == 2:
                    child = child_2
                elif level == 3:
                    child = child_3
                else:
                    child = child_4
                place = (row * tl.load(node_counts + level) + node).to(tl.int64) * tl.load(widths + level)
                node = tl.load(child + place + _digit(bits, index, level), mask=inside, other=-1)
                inside = inside & (node >= 0)
                node = tl.where(inside, node, 0)
            place = node * width + _digit(bits, index, LEVEL)
            if LEVEL < 5:
                is_zero = inside & (bits == 0)
                tl.atomic_add(counts + place, 1, mask=inside & (bits != 0), sem="relaxed")
                zeros = tl.sum(tl.reshape(is_zero.to(tl.int32), [BLOCK // GROUP, GROUP]), 1)
                of_zero = tl.max(tl.reshape(tl.where(is_zero, place, 0), [BLOCK // GROUP, GROUP]), 1)
                tl.atomic_add(counts + of_zero, zeros, mask=zeros > 0, sem="relaxed")
            else:
                tl.atomic_add(counts + place, 1, mask=inside, sem="relaxed")
    if LEVEL == 0:
        tl.atomic_add(counts + tl.arange(0, FIRST_WIDTH), first_digits, sem="relaxed")


@triton.jit(do_not_specialize=["wanted"])
def sums_between(
    addresses, sizes, first_blocks, block_rows, keys, units, sums, wanted, DEPTH: tl.constexpr,
    REPLICAS: tl.constexpr, BASE: tl.constexpr, SOURCES: tl.constexpr, ALIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds floor(unit * |x - base|) of every element to the first of its row's keys that is not before it.

    Args:
        addresses: [rows, 3] int64: output, base, source.
        sizes: As of `largest`.
        first_blocks: As of `largest`.
        block_rows: As of `largest`.
        keys: [rows, wanted] int64, ascending: (GREATEST - bits) * 2**32 + index.
        units: [rows] float32.
        sums: [rows, REPLICAS, wanted + 1] int64, added to; the last: of elements after every key.
        wanted: Number of keys of a row.
        DEPTH: Steps of a binary search among them.
        REPLICAS: Of the sums.
        BASE: Type of the bases.
        SOURCES: Type of the sources.
        ALIGNED: As of `largest`.
        STEPS: Blocks of a chunk.
        BLOCK: Elements of a block.

    Returns:
        Nothing: it writes to memory.
    """
    row, first, size, steps = _chunk(sizes, first_blocks, block_rows, ALIGNED, STEPS, BLOCK)
    addresses += row * 3
    unit = tl.load(units + row)
    sums += (row * REPLICAS + tl.program_id(0) % REPLICAS).to(tl.int64) * (wanted + 1)
    keys += row.to(tl.int64) * wanted
    for step in range(steps):
        index = tl.multiple_of(first + step * BLOCK, BLOCK) + tl.arange(0, BLOCK)
        inside = index < size
        d = _difference(addresses, 0, index, inside, True, BASE, SOURCES, ALIGNED)
        key = ((magnitude_bits(d) ^ GREATEST).to(tl.int64) << 32) + index.to(tl.int64)
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.zeros([BLOCK], tl.int32) + wanted
        for _ in tl.static_range(DEPTH):
            middle = (low + high) >> 1
            is_open = low < high
            is_before = tl.load(keys + middle, mask=is_open, other=0) < key
            low = tl.where(is_open & is_before, middle + 1, low)
            high = tl.where(is_open & (is_before == 0), middle, high)
        worth = (tl.abs(d) * unit).to(tl.int64)
        tl.atomic_add(sums + low, worth, mask=inside & (worth > 0), sem="relaxed")
