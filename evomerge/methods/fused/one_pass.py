"""One pass over the tensors of a merge, by the first kernel backend that fits.

C on the CPU, Triton on a CUDA device, torch anywhere.

A backend is a module (or object) with the members of `KernelBackend`; a new one is a file and an entry of
`BACKENDS`. All give the same bits, so that which one runs changes the time and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from evomerge.methods.fused import c_kernels, exact_products, torch_kernels, triton_kernels
from evomerge.methods.fused.weighted_sum import Summand, WeightedSum

Array = np.ndarray[Any, np.dtype[Any]]


class KernelBackend(Protocol):
    """One implementation of the kernels. Tensors are flat [n], contiguous, on one device, in any float types.

    Attributes:
        name: What it is called in tests and benchmarks.
    """

    name: str

    def fits(self, tensors: Sequence[Tensor | None], summands: Sequence[Summand] = ()) -> bool:
        """Whether the backend takes these tensors and summands.

        Args:
            tensors: Everything that is read or written; None where there is no base.
            summands: The masks that are applied.

        Returns:
            True where every kernel below gives the reference's bits for them.
        """

    def write_sum(
        self, base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor
    ) -> bool:
        """Writes base + factor * sum / divisor.

        Args:
            base: [n], or None for a sum of the sources themselves.
            sources: One [n] per summand.
            total: The summands and how they are summed.
            out: [n], written.

        Returns:
            Whether every element of the result is finite.
        """

    def l1_norms(self, base: Tensor, source: Tensor, summand: Summand, unit: float) -> tuple[float, float]:
        """Sums of floor(unit * |x - base|), exact for a unit of `exact_unit`.

        Args:
            base: [n].
            source: [n].
            summand: Its mask says which elements are kept.
            unit: A power of two.

        Returns:
            (the sum over all elements, the sum over those that the summand keeps).
        """

    def largest(self, base: Tensor | None, sources: Sequence[Tensor]) -> list[float]:
        """The largest magnitude of each x_i - base (of each x_i without a base).

        Args:
            base: [n] or None.
            sources: Each [n].

        Returns:
            One number for each source: 0 for n = 0; NaN where any is.
        """

    def product_sums(
        self,
        base: Tensor | None,
        sources: Sequence[Tensor],
        pairs: Sequence[tuple[int, int]],
        exponents: Sequence[int],
    ) -> list[int]:
        """Sums of whole numbers that are dot products of x_i - base (of x_i without a base).

        See `exact_products` for their definition: all backends give the same numbers.

        Args:
            base: [n] or None.
            sources: Each [n].
            pairs: Numbers of the two sources of each dot product.
            exponents: For each pair u, see `exact_products.unit_exponent`.

        Returns:
            For each pair the sum of whole * 2**REST_BITS + rest.
        """

    def projections(self, gradient: Tensor, base: Tensor | None, sources: Sequence[Tensor]) -> Array:
        """Dot products of one tensor with x_i - base (with x_i without a base).

        Differences are formed in 32-bit floats, multiplied and summed in 64-bit ones, piece by piece in a
        fixed order. Backends may differ in the last bits.

        Args:
            gradient: [n].
            base: [n] or None.
            sources: Each [n].

        Returns:
            [sources] float64.
        """

    def hash_sums(self, base: Tensor, source: Tensor, key: tuple[int, int], unit: float, grid: int) -> Array:
        """Sums of floor(unit * |x - base|) by the cell of an element's hash.

        Args:
            base: [n].
            source: [n].
            key: Of the mask, see `random_masks.split`.
            unit: A power of two, see `exact_unit`.
            grid: Number of cells; their upper bounds are `random_masks.grid_bounds`.

        Returns:
            [grid] float64.
        """

    def rank_rows(self, base: Tensor, source: Tensor, width: int, out: Tensor) -> float:
        """Ranks of |x - base| within each row, ascending; of equal ones the first come first.

        Args:
            base: [n].
            source: [n].
            width: Number of elements of a row; n is a multiple of it.
            out: [n] uint16, or int32 for rows of more than 65536 elements; written.

        Returns:
            The largest |x - base|, 0 for an empty tensor, as `largest` gives it.
        """

    def top_k_table(self, base: Tensor, source: Tensor, counts: Sequence[int]) -> tuple[Array, Array]:
        """The k elements of largest |x - base| for many k at once; of equal ones the first come first.

        Args:
            base: [n].
            source: [n].
            counts: The k, ascending, each in [1, n].

        Returns:
            (magnitude of the k-th largest element, [counts] float32; index of the last of the elements of
            this magnitude that belong, [counts] int64).
        """

    def top_k_sums(
        self,
        base: Tensor,
        source: Tensor,
        unit: float,
        counts: Sequence[int],
        thresholds: Array,
        lasts: Array,
    ) -> Array:
        """Sums of floor(unit * |x - base|) over the k largest, for many k at once.

        Args:
            base: [n].
            source: [n].
            unit: A power of two, see `exact_unit`.
            counts: The k, ascending, each in [1, n].
            thresholds: [counts] float32, what `top_k_table` gives for them.
            lasts: [counts] int64, too.

        Returns:
            [counts] float64.
        """


BACKENDS: tuple[KernelBackend, ...] = (c_kernels, triton_kernels, torch_kernels)
"""In the order in which they are tried; the last takes everything."""


def backend_for(tensors: Sequence[Tensor | None], summands: Sequence[Summand] = ()) -> KernelBackend:
    """The first backend that takes the tensors.

    Args:
        tensors: Everything that is read or written; None where there is no base.
        summands: The masks that are applied.

    Returns:
        A member of `BACKENDS`.
    """
    return next(backend for backend in BACKENDS if backend.fits(tensors, summands))


def write_sum(base: Tensor | None, sources: Sequence[Tensor], total: WeightedSum, out: Tensor) -> bool:
    """Writes base + factor * sum / divisor.

    Args:
        base: None for a sum of the sources themselves.
        sources: One per summand; of the base's shape, contiguous, on its device, of any float types.
        total: The summands and how they are summed.
        out: Of the same shape, any float type; written.

    Returns:
        Whether every element of the result is finite.
    """
    backend = backend_for([base, *sources, out], total.summands)
    flat_base = None if base is None else base.reshape(-1)
    return backend.write_sum(flat_base, [x.reshape(-1) for x in sources], total, out.view(-1))


def l1_norms(base: Tensor, source: Tensor, summand: Summand, unit: float) -> tuple[float, float]:
    """Sums of floor(unit * |x - base|), exact for a unit of `exact_unit`.

    Args:
        base: The base's tensor.
        source: The source's tensor.
        summand: Its mask says which elements are kept.
        unit: A power of two.

    Returns:
        (the sum over all elements, the sum over those that the summand keeps).
    """
    backend = backend_for([base, source], [summand])
    return backend.l1_norms(base.reshape(-1), source.reshape(-1), summand, unit)


def dot_products(
    base: Tensor | None, sources: Sequence[Tensor], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """Exact dot products of x_i - base (of x_i without a base); each tensor is one vector.

    The same bits in any order, on any device, see `exact_products`.

    Args:
        base: The base's tensor or None.
        sources: The sources' tensors, of one shape.
        pairs: Numbers of the two sources of each dot product.

    Returns:
        One number for each pair; NaN where one of the vectors is not finite.
    """
    flat_base = None if base is None else base.reshape(-1)
    flat = [x.reshape(-1) for x in sources]
    backend = backend_for([base, *sources])
    tops, n = backend.largest(flat_base, flat), sources[0].numel()
    exponents = {pair: exact_products.unit_exponent(n, tops[pair[0]], tops[pair[1]]) for pair in pairs}
    summed = {pair: u for pair, u in exponents.items() if u is not None}
    totals = backend.product_sums(flat_base, flat, list(summed), list(summed.values())) if summed else []
    found = {
        pair: exact_products.value(total, u) for (pair, u), total in zip(summed.items(), totals, strict=True)
    }
    return [
        found[i, k] if (i, k) in found else exact_products.product_without_unit(tops[i], tops[k])
        for i, k in pairs
    ]


def projections(gradient: Tensor, base: Tensor | None, sources: Sequence[Tensor]) -> list[float]:
    """Dot products of one tensor with x_i - base (with x_i without a base), summed in 64-bit floats.

    Args:
        gradient: Any shape and float type.
        base: The base's tensor or None, of the same shape.
        sources: The sources' tensors, of the same shape.

    Returns:
        One number for each source.
    """
    flat = [tensor.contiguous().reshape(-1) for tensor in (gradient, *sources)]
    flat_base = None if base is None else base.contiguous().reshape(-1)
    found: list[float] = backend_for([flat_base, *flat]).projections(flat[0], flat_base, flat[1:]).tolist()
    return found


def largest_difference(base: Tensor, source: Tensor) -> float:
    """The largest magnitude of the difference of two tensors.

    Args:
        base: The base's tensor.
        source: The source's tensor.

    Returns:
        max |x - base|, 0 for an empty tensor.
    """
    return backend_for([base, source]).largest(base.reshape(-1), [source.reshape(-1)])[0]


def exact_unit(top: float, n: int) -> float:
    """A unit in which magnitudes become whole numbers whose sum is exact in any order.

    Args:
        top: The largest magnitude.
        n: How many magnitudes are summed.

    Returns:
        A power of two by which n magnitudes up to `top` sum to less than 2**53; 1 for a top that is 0 or not
        finite.
    """
    if not 0 < top < math.inf:
        return 1.0
    exponent = 52 - math.ceil(math.log2(n)) - math.frexp(top)[1]
    return 2.0 ** max(-126, min(126, exponent))
