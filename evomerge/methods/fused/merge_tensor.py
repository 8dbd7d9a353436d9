"""Merges one tensor in one pass over the parents: turns a method's values into a `WeightedSum` and runs it.

Methods that are sums of task vectors (linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA) declare a
`TaskVectorSum`; methods whose result is a combination of whole tensors declare their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from evomerge.methods.declaration import Method, SourceValues, Sparsifier, TaskVectorSum, Values
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.one_pass import write_sum
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair, WeightedSum


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The tensors that are merged into one, and what belongs to each source.

    Attributes:
        sources: One tensor per source model, all of one shape, in their stored types, contiguous.
        base: The base model's tensor of the same shape, or None for a merge without a base.
        mask_keys: A signed 64-bit mask key per source; used by randomized methods only.
        source_ids: What `MagnitudeTables` caches what it knows of each source's tensor under; None, or an
            empty sequence, for nothing cached.
        base_id: The same for the base's tensor.
    """

    sources: Sequence[Tensor]
    base: Tensor | None
    mask_keys: Sequence[int] = ()
    source_ids: Sequence[Hashable] = ()
    base_id: Hashable = None

    def pairs(self) -> list[TensorPair]:
        """Each source with the base; needs a base."""
        assert self.base is not None
        ids = self.difference_ids()
        return [TensorPair(self.base, x, id) for x, id in zip(self.sources, ids, strict=True)]

    def difference_ids(self) -> list[Hashable]:
        """What each source's difference from the base is cached under; None for not cached."""
        known = self.source_ids or [None] * len(self.sources)
        return [None if id is None or self.base_id is None else (id, self.base_id) for id in known]


def merge_tensor(
    task_vector_sum: TaskVectorSum,
    inputs: MergeInputs,
    values: Values,
    out: Tensor,
    tables: MagnitudeTables,
) -> bool:
    """Merges one tensor by a weighted sum of task vectors, in one pass over the inputs.

    Args:
        task_vector_sum: What the method declares of itself.
        inputs: The sources and, for methods that have one, the base.
        values: The method's parameter values for this tensor.
        out: Receives the result; shape of the sources, any float type.
        tables: Cached magnitudes of task vectors; they change the time, never the result.

    Returns:
        Whether every element of the result is finite.
    """
    total = weighted_sum_of(task_vector_sum, inputs, values, tables)
    return write_sum(inputs.base, inputs.sources, total, out)


def weighted_sum_of(
    task_vector_sum: TaskVectorSum, inputs: MergeInputs, values: Values, tables: MagnitudeTables
) -> WeightedSum:
    """What `merge_tensor` computes for one tensor.

    Args:
        task_vector_sum: What the method declares of itself.
        inputs: The sources and, for methods that have one, the base.
        values: The method's parameter values for this tensor.
        tables: Cached magnitudes of task vectors.

    Returns:
        One summand per source, and how they are summed.
    """
    weights = _per_source(values, "weight")
    factor = values.get("lambda", 1.0)
    assert isinstance(factor, float)
    summands = _summands(task_vector_sum, inputs, values, tables)
    divisor = _divisor(task_vector_sum, weights, bool(values["normalize"]), based=inputs.base is not None)
    return WeightedSum(summands, task_vector_sum.elect_sign, divisor, factor)


def combine_by_dot_products(
    rule: Method, inputs: MergeInputs, values: Values, out: Tensor, tables: MagnitudeTables
) -> bool | None:
    """Merges one tensor by a method that combines whole tensors by coefficients from their dot products.

    Args:
        rule: A method that declares `coefficients`.
        inputs: The sources and, for methods that have one, the base.
        values: The method's parameter values for this tensor.
        out: Receives the result; shape of the sources, any float type.
        tables: Remembers dot products; a tensor whose products are there is merged in one pass.

    Returns:
        Whether every element of the result is finite; None, with `out` left alone, where the method has no
        such coefficients for these values.
    """
    assert rule.coefficients is not None
    sources, base = inputs.sources, inputs.base
    ids: Sequence[Hashable] = inputs.source_ids or [None] * len(sources)
    if base is not None and rule.base_is_origin:
        ids = inputs.difference_ids()
    elif base is not None:
        sources, base, ids = [base, *sources], None, [inputs.base_id, *ids]
    if not out.numel():
        return None
    # with all vectors alike: whether the method needs more than dot products for these values
    if rule.coefficients([[1.0] * len(sources)] * len(sources), values) is None:
        return None
    coefficients = rule.coefficients(tables.dot_products(base, sources, ids), values)
    assert coefficients is not None
    summands = tuple(Summand(MaskKind.DENSE, c) for c in coefficients)
    return write_sum(base, sources, WeightedSum(summands), out)


def _summands(
    task_vector_sum: TaskVectorSum, inputs: MergeInputs, values: Values, tables: MagnitudeTables
) -> tuple[Summand, ...]:
    sparsifier = task_vector_sum.sparsifier
    if sparsifier is None:
        return tuple(Summand(MaskKind.DENSE, weight) for weight in _per_source(values, "weight"))
    pairs, rescale = inputs.pairs(), bool(values["rescale"])
    if sparsifier.uses_top_table:
        tables.prepare(pairs)
    summands = []
    for i, (pair, key) in enumerate(zip(pairs, inputs.mask_keys, strict=True)):
        own = {name: value[i] for name, value in values.items() if isinstance(value, tuple)}
        summands.append(_sparse_summand(sparsifier, pair, own, key, tables, rescale=rescale))
    return tuple(summands)


def _sparse_summand(
    sparsifier: Sparsifier,
    pair: TensorPair,
    values: SourceValues,
    mask_key: int,
    tables: MagnitudeTables,
    *,
    rescale: bool,
) -> Summand:
    if values["density"] >= 1:
        return Summand(MaskKind.DENSE, values["weight"])
    if values["density"] <= 0 or pair.n == 0:
        return Summand(MaskKind.BAND, values["weight"])  # keeps nothing
    summand = sparsifier.summand(pair, values, mask_key, tables)
    return replace(summand, scale=tables.scale(pair, summand)) if rescale else summand


def _divisor(
    task_vector_sum: TaskVectorSum, weights: Sequence[float], normalize: bool, *, based: bool
) -> float | None:
    """What the sum is divided by; None for the sum of the weights that agree in sign at each element."""
    if not normalize:
        return 1.0
    if task_vector_sum.elect_sign:
        return None
    total = math.fsum(weights)
    return 1.0 if based and abs(total) < 1e-8 else total


def _per_source(values: Values, name: str) -> tuple[float, ...]:
    numbers = values[name]
    assert isinstance(numbers, tuple)
    return numbers
