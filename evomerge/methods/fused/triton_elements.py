"""What Triton kernels over a table of tensors share: reading and writing elements, hashes of indices.

A kernel gets tensors by address, so that tensors of any places on a device fit one launch. Types are the
numbers of `tensor_table.TYPE_CODES`. Imported only where Triton is there.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def typed_pointer(slot, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Reads an address.

    Args:
        slot: Pointer to an int64 address.
        TYPE: Type of what lies there; bfloat16 is taken as uint16.
        ALIGNED: Whether the address is a multiple of 16 bytes.

    Returns:
        The address as a pointer to that type.
    """
    address = tl.load(slot)
    if TYPE == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif TYPE == BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(slot, index, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Reads elements of a tensor as float32, exactly.

    Args:
        slot: Pointer to the tensor's address.
        index: Of the elements.
        inside: Which of them to read; the others are 0.
        TYPE: The tensor's type.
        ALIGNED: Whether its address is a multiple of 16 bytes.

    Returns:
        float32 of the shape of `index`.
    """
    pointer = typed_pointer(slot, TYPE, ALIGNED)
    if TYPE == BFLOAT16:
        bits = tl.load(pointer + index, mask=inside, other=0).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(slot, index, inside, value, TYPE: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """Writes float32 values to a tensor, rounded to nearest even.

    Args:
        slot: Pointer to the tensor's address.
        index: Of the elements.
        inside: Which of them to write.
        value: float32.
        TYPE: The tensor's type.
        ALIGNED: Whether its address is a multiple of 16 bytes.
        NATIVE: Whether the device rounds to bfloat16; else integers do, for Triton's interpreter rounds
            halves up.

    Returns:
        Nothing: it writes to memory.
    """
    pointer = typed_pointer(slot, TYPE, ALIGNED)
    if TYPE == FLOAT32:
        tl.store(pointer + index, value, mask=inside)
    elif TYPE == FLOAT16:
        tl.store(pointer + index, value.to(tl.float16), mask=inside)
    elif NATIVE:
        tl.store(pointer + index, value.to(tl.bfloat16).to(tl.uint16, bitcast=True), mask=inside)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(pointer + index, rounded.to(tl.uint16), mask=inside)


@triton.jit
def least_infinite(TYPE: tl.constexpr):
    """Finds what is not finite once it is rounded to a type.

    Args:
        TYPE: The type.

    Returns:
        Bits of the least such positive float32.
    """
    if TYPE == BFLOAT16:
        least = 0x7F7F8000
    elif TYPE == FLOAT16:
        least = 0x477FF000
    else:
        least = 0x7F800000
    return least


@triton.jit
def magnitude_bits(x):
    """Bits of magnitudes, which are in their order.

    Args:
        x: float32.

    Returns:
        int32, those of |x|.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def mixed(index):
    """Wellons' lowbias32, as `random_masks.mixed`.

    Args:
        index: int32.

    Returns:
        uint32.
    """
    x = index.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hashed(x, key, odd):
    """Mixed indices hashed with a key, as `random_masks.hashed`.

    Args:
        x: uint32, see `mixed`.
        key: int32.
        odd: int32.

    Returns:
        uint32.
    """
    return (x ^ key.to(tl.uint32, bitcast=True)) * odd.to(tl.uint32, bitcast=True)
