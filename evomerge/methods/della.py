"""DELLA (Deep et al. 2024, arXiv 2406.11617): drop entries at random, the small ones of a row more often.

The keep probability is linear in an entry's rank by magnitude within its row (last axis), from density -
epsilon to density + epsilon. mergekit refuses an epsilon that leaves (0, 1) and ranks tensors of three and
more axes along the second; here epsilon shrinks to min(epsilon, density, 1 - density), so that every point of
a search can be merged. Masks are keyed (see `random_masks`); for mergekit's they agree in distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.declaration import MaskNumbers, Param, SourceValues, Sparsifier, TaskVectorSum
from evomerge.methods.fused.difference_rows import Array, DifferenceRows
from evomerge.methods.fused.launch_numbers import KEY, ODD, P_LOW, P_STEP, LaunchNumbers
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.sum_numbers import MaskKeys, unknown_norms
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair
from evomerge.methods.task_vectors import task_vector_method


def window(density: float, epsilon: float, width: int) -> tuple[float, float]:
    """The keep probabilities of a row's entries, by their rank.

    Args:
        density: Their mean, in [0, 1].
        epsilon: Half of what they span, at least 0; shrunk where it would leave [0, 1].
        width: Number of entries of the row, at least 1.

    Returns:
        (probability of the smallest entry, growth for each rank).
    """
    epsilon = min(epsilon, density, 1 - density) if width > 1 else 0.0
    return density - epsilon, 2 * epsilon / max(1, width - 1)


def mask(
    delta: Tensor, density: float, key: int, values: SourceValues, mergekit_compatible: bool = False
) -> Tensor:
    """See `MaskFunction.__call__`: each entry kept with its own probability; values: epsilon."""
    width = delta.shape[-1] if delta.dim() else 1
    low, step = window(density, values["epsilon"], width)
    order = delta.abs().reshape(-1, width).argsort(dim=1, stable=True)
    position = torch.arange(width, device=delta.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, position)
    p = rank.flatten().float() * step + low
    hashes = random_masks.hashed(random_masks.mixed(0, delta.numel(), delta.device), random_masks.split(key))
    return (hashes.float() < p * 2.0**32 - 2.0**31).to(delta.dtype).reshape(delta.shape)


def summand(pair: TensorPair, values: SourceValues, mask_key: int, tables: MagnitudeTables) -> Summand:
    """See `SummandFunction.__call__`."""
    low, step = window(values["density"], values["epsilon"], pair.width)
    return Summand(
        MaskKind.RANKED,
        values["weight"],
        key=random_masks.split(mask_key),
        ranks=tables.ranks(pair),
        low=low,
        step=step,
    )


def mask_numbers(
    numbers: LaunchNumbers,
    rows: DifferenceRows,
    values: Mapping[str, Array],
    keys: MaskKeys | None,
    is_masked: Array,
) -> Array:
    """See `MaskNumbersFunction.__call__`: the probabilities are those of `window`."""
    assert keys is not None
    density = values["density"]
    epsilon = np.minimum(np.minimum(values["epsilon"], density), 1 - density)
    epsilon = np.where(rows.widths > 1, epsilon, 0.0)
    numbers.integers[..., [KEY, ODD]] = keys.words
    numbers.floats[..., P_LOW] = density - epsilon
    numbers.floats[..., P_STEP] = 2 * epsilon / np.maximum(1, rows.widths - 1)
    return unknown_norms(rows)


_EPSILON = Param("epsilon", 0.0, 0.2, 0.15, hard_low=0.0, hard_high=0.5)
BY_RANK = Sparsifier(
    mask,
    summand,
    randomized=True,
    bytes_per_element=2,  # the rank of every element
    masks=MaskNumbers(MaskKind.RANKED, mask_numbers),
)
DELLA = task_vector_method(
    "della",
    TaskVectorSum(BY_RANK, elect_sign=True),
    (_EPSILON,),
    normalize=True,
    rescale=True,
    paper="arXiv 2406.11617",
    summary="drop small entries more often, rescale, elect a sign, sum those that agree",
)
DELLA_LINEAR = task_vector_method(
    "della_linear",
    TaskVectorSum(BY_RANK),
    (_EPSILON,),
    normalize=False,
    rescale=True,
    paper="arXiv 2406.11617",
    summary="drop small entries more often, rescale, sum",
)
