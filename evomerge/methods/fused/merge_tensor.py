"""Merging by sums of task vectors in one pass over the parents: linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA.

What these methods have in common is said by `methods.method.TaskVectorSum`; this room turns a method's values for one tensor
into a `WeightedSum` and runs it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from evomerge.methods import breadcrumbs, della, random_masks, ties
from evomerge.methods.declaration import Method, TaskVectorSum, Values
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.one_pass import gram, run
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair, WeightedSum


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The tensors that are merged into one, and what belongs to each source.

    Attributes:
        sources: One tensor per source model, all of one shape, in their stored types, contiguous.
        base: The base model's tensor of the same shape, or None for a merge without a base.
        mask_keys: A signed 64-bit mask key per source; used by randomized methods only.
        cache_ids: What `MagnitudeTables` caches each source's difference from the base under; None, or an empty
            sequence, for nothing cached.
    """

    sources: Sequence[Tensor]
    base: Tensor | None
    mask_keys: Sequence[int] = ()
    cache_ids: Sequence[Hashable] = ()

    def pairs(self) -> list[TensorPair]:
        """Each source with the base; needs a base."""
        assert self.base is not None
        ids = self.cache_ids or [None] * len(self.sources)
        return [TensorPair(self.base, x, id) for x, id in zip(self.sources, ids, strict=True)]


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
    weights = _per_source(values, "weight")
    factor = values.get("lambda", 1.0)
    assert isinstance(factor, float)
    summands = _summands(task_vector_sum, inputs, values, tables)
    divisor = _divisor(task_vector_sum, weights, bool(values["normalize"]), based=inputs.base is not None)
    total = WeightedSum(summands, task_vector_sum.elect_sign, divisor, factor)
    return run(inputs.base, inputs.sources, total, out)


def combine_by_dot_products(rule: Method, inputs: MergeInputs, values: Values, out: Tensor) -> bool | None:
    """Merges one tensor by a method that combines whole tensors with coefficients found from their dot products.

    Args:
        rule: A method that declares `coefficients`.
        inputs: The sources and, for methods that have one, the base.
        values: The method's parameter values for this tensor.
        out: Receives the result; shape of the sources, any float type.

    Returns:
        Whether every element of the result is finite; None, with `out` left alone, where the method has no such
        coefficients for these values.
    """
    assert rule.coefficients is not None
    sources, base = inputs.sources, inputs.base
    if base is not None and not rule.base_is_origin:
        sources, base = [base, *sources], None
    coefficients = rule.coefficients(gram(base, sources), values) if out.numel() else None
    if coefficients is None:
        return None
    summands = tuple(Summand(MaskKind.DENSE, c) for c in coefficients)
    return run(base, sources, WeightedSum(summands), out)


def _summands(
    task_vector_sum: TaskVectorSum, inputs: MergeInputs, values: Values, tables: MagnitudeTables
) -> tuple[Summand, ...]:
    if task_vector_sum.sparsify is None:
        return tuple(Summand(MaskKind.DENSE, w) for w in _per_source(values, "weight"))
    pairs, rescale = inputs.pairs(), bool(values["rescale"])
    if task_vector_sum.sparsify == "largest":
        tables.prepare(pairs)
    return tuple(
        _share(task_vector_sum, pair, values, i, key, rescale, tables)
        for i, (pair, key) in enumerate(zip(pairs, inputs.mask_keys, strict=True))
    )


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


def _share(
    task_vector_sum: TaskVectorSum,
    pair: TensorPair,
    values: Values,
    i: int,
    mask_key: int,
    rescale: bool,
    known: MagnitudeTables,
) -> Summand:
    weight, d = _per_source(values, "weight")[i], _per_source(values, "density")[i]
    if d >= 1:
        return Summand(MaskKind.DENSE, weight)
    if d <= 0 or pair.n == 0:
        return Summand(MaskKind.BAND, weight)  # keeps nothing
    share, memo = _kept(task_vector_sum, pair, values, i, mask_key, known)
    if not rescale:
        return share
    scale = known.scale(pair, share, memo)
    return replace(share, scale=scale)


def _kept(
    task_vector_sum: TaskVectorSum,
    pair: TensorPair,
    values: Values,
    i: int,
    mask_key: int,
    known: MagnitudeTables,
) -> tuple[Summand, Hashable]:
    """The share before it is rescaled, and what its mask depends on besides the pair and the key."""
    weight, d, n = _per_source(values, "weight")[i], _per_source(values, "density")[i], pair.n
    if task_vector_sum.sparsify == "largest":
        k = ties.count(d, n)
        return Summand(MaskKind.BAND, weight, inner=known.level(pair, k)), k
    if task_vector_sum.sparsify == "random":
        bound = random_masks.bound(d)
        return Summand(
            MaskKind.DENSE if bound == 1 << 31 else MaskKind.RANDOM,
            weight,
            key=random_masks.split(mask_key),
            bound=min(bound, (1 << 31) - 1),
        ), bound
    if task_vector_sum.sparsify == "band":
        inner, outer = breadcrumbs.band(n, d, _per_source(values, "gamma")[i])
        return Summand(
            MaskKind.BAND,
            weight,
            inner=known.level(pair, inner),
            outer=known.level(pair, outer) if outer else None,
        ), (inner, outer)
    low, step = della.window(
        d, _per_source(values, "epsilon")[i], pair.base.shape[-1] if pair.base.dim() else 1
    )
    return Summand(
        MaskKind.RANKED, weight, key=random_masks.split(mask_key), ranks=known.ranks(pair), low=low, step=step
    ), (low, step)


def _per_source(values: Values, name: str) -> tuple[float, ...]:
    found = values[name]
    assert isinstance(found, tuple)
    return found
