"""Exact dot products of tensors: a sum of whole numbers, the same in any order, on any device.

A dot product of two float32 vectors a and b is the sum of its n products, each rounded to a unit
that depends on n and on the largest magnitudes alone:

    exponent of the unit   u = min(50, 61 - ceil(log2 n)) - e(max |a|) - e(max |b|),  x < 2**e(x) <= 2 x
    whole                  round(a_j b_j 2**u)
    rest                   round((a_j b_j 2**u - whole) 2**REST_BITS)
    dot product            (sum of whole * 2**REST_BITS + sum of rest) * 2**-(u + REST_BITS), rounded once

The product of two float32 numbers is exact in float64, and so is every line but the two roundings, which are
to nearest, ties to even. Sums of `whole` stay below 2**61; those of `rest` fit 64 bits for up to 2**23
elements, so that a kernel adds pieces of at most that. The error is below n 2**-(u + REST_BITS + 1): for
tensors and weights of usual sizes far below the last bit of a float64.
"""

from __future__ import annotations

import math

REST_BITS = 40
_MOST_BITS = 50  # of a rounded product: adding 1.5 * 2**52 to one rounds it
_SUM_BITS = 61


def unit_exponent(n: int, top_a: float, top_b: float) -> int | None:
    """The exponent u of the unit of a dot product.

    Args:
        n: Number of elements, at least 1.
        top_a: Largest magnitude of the one vector.
        top_b: Largest magnitude of the other.

    Returns:
        u; None where a vector is zero or not finite, and the product follows without a sum, see
        `product_without_unit`.
    """
    if not (0 < top_a < math.inf and 0 < top_b < math.inf):
        return None
    bits = min(_MOST_BITS, _SUM_BITS - (n - 1).bit_length())
    return bits - math.frexp(top_a)[1] - math.frexp(top_b)[1]


def product_without_unit(top_a: float, top_b: float) -> float:
    """The dot product of vectors one of which is zero or not finite.

    Args:
        top_a: Largest magnitude of the one vector, NaN for one with NaN.
        top_b: Largest magnitude of the other.

    Returns:
        0.0, or NaN where one is not finite.
    """
    return 0.0 if math.isfinite(top_a) and math.isfinite(top_b) else math.nan


def value(total: int, exponent: int) -> float:
    """A dot product from its sum of whole numbers.

    Args:
        total: Sum of whole * 2**REST_BITS + rest.
        exponent: u, see `unit_exponent`.

    Returns:
        The nearest float64.
    """
    return math.ldexp(total, -(exponent + REST_BITS))
