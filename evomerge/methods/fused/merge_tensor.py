"""Merging by sums of task vectors in one pass over the parents: linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA.

What these methods have in common is said by `methods.method.TaskVectorSum`; this room turns a method's values for one tensor
into a `WeightedSum` and runs it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import Tensor

from evomerge.methods import breadcrumbs, della, random_masks, ties
from evomerge.methods.declaration import Method, TaskVectorSum, Values
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.one_pass import gram, run
from evomerge.methods.fused.weighted_sum import Kind, Pair, Summand, WeightedSum


def merge(
    frame: TaskVectorSum,
    pairs: Sequence[Pair],
    sources: Sequence[Tensor],
    base: Tensor | None,
    values: Values,
    keys: Sequence[int],
    out: Tensor,
    known: MagnitudeTables,
) -> bool:
    """Merges one tensor into `out` (shape of the sources, any float type); returns whether the result is finite.

    sources: in their stored types; pairs: each with its base, for methods that have one; keys: 64-bit mask keys.
    """
    weights = _each(values, "weight")
    normalize, factor = bool(values["normalize"]), values.get("lambda", 1.0)
    assert isinstance(factor, float)
    if frame.sparsify is None:
        shares = tuple(Summand(Kind.DENSE, w) for w in weights)
    else:
        rescale = bool(values["rescale"])
        if frame.sparsify == "largest":
            known.prepare(pairs)
        shares = tuple(
            _share(frame, pair, values, i, key, rescale, known)
            for i, (pair, key) in enumerate(zip(pairs, keys, strict=True))
        )
    divisor: float | None = 1.0
    if normalize:
        divisor = None if frame.elect_sign else math.fsum(weights)
        if divisor is not None and base is not None and abs(divisor) < 1e-8:
            divisor = 1.0
    return run(base, sources, WeightedSum(shares, frame.elect_sign, divisor, factor), out)


def by_angles(
    rule: Method, sources: Sequence[Tensor], base: Tensor | None, values: Values, out: Tensor
) -> bool | None:
    """Like `merge`, for a method whose result is a combination of its vectors by coefficients that their dot products give.

    Returns None, and leaves `out`, where the method has no such coefficients for these values.
    """
    assert rule.coefficients is not None
    if base is not None and not rule.base_is_origin:
        sources, base = [base, *sources], None
    found = rule.coefficients(gram(base, sources), values) if out.numel() else None
    if found is None:
        return None
    return run(base, sources, WeightedSum(tuple(Summand(Kind.DENSE, c) for c in found)), out)


def _share(
    frame: TaskVectorSum,
    pair: Pair,
    values: Values,
    i: int,
    mask_key: int,
    rescale: bool,
    known: MagnitudeTables,
) -> Summand:
    weight, d = _each(values, "weight")[i], _each(values, "density")[i]
    if d >= 1:
        return Summand(Kind.DENSE, weight)
    if d <= 0 or pair.n == 0:
        return Summand(Kind.BAND, weight)  # keeps nothing
    share, memo = _kept(frame, pair, values, i, mask_key, known)
    if not rescale:
        return share
    scale = known.scale(pair, share, memo)
    return replace(share, scale=scale)


def _kept(
    frame: TaskVectorSum, pair: Pair, values: Values, i: int, mask_key: int, known: MagnitudeTables
) -> tuple[Summand, Hashable]:
    """The share before it is rescaled, and what its mask depends on besides the pair and the key."""
    weight, d, n = _each(values, "weight")[i], _each(values, "density")[i], pair.n
    if frame.sparsify == "largest":
        k = ties.count(d, n)
        return Summand(Kind.BAND, weight, inner=known.level(pair, k)), k
    if frame.sparsify == "random":
        bound = random_masks.bound(d)
        return Summand(
            Kind.DENSE if bound == 1 << 31 else Kind.RANDOM,
            weight,
            key=random_masks.split(mask_key),
            bound=min(bound, (1 << 31) - 1),
        ), bound
    if frame.sparsify == "band":
        inner, outer = breadcrumbs.band(n, d, _each(values, "gamma")[i])
        return Summand(
            Kind.BAND,
            weight,
            inner=known.level(pair, inner),
            outer=known.level(pair, outer) if outer else None,
        ), (inner, outer)
    low, step = della.window(d, _each(values, "epsilon")[i], pair.base.shape[-1] if pair.base.dim() else 1)
    return Summand(
        Kind.RANKED, weight, key=random_masks.split(mask_key), ranks=known.ranks(pair), low=low, step=step
    ), (low, step)


def _each(values: Values, name: str) -> tuple[float, ...]:
    found = values[name]
    assert isinstance(found, tuple)
    return found
