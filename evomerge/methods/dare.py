"""DARE (Yu et al. 2024, arXiv 2311.03099): drop entries of the task vectors at random, rescale the rest.

Masks are keyed, not drawn (see `random_masks`), and they nest: what density .3 keeps, density .5 keeps too.
The rescale matches the L1 norm, as mergekit does since 2025, not the paper's 1/density. mergekit draws from
one global generator, so its masks depend on the order of the models and on the device; the two agree in
distribution only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from evomerge.methods import random_masks
from evomerge.methods.declaration import MaskNumbers, SourceValues, Sparsifier, TaskVectorSum
from evomerge.methods.fused.difference_rows import Array, DifferenceRows
from evomerge.methods.fused.launch_numbers import BOUND, KEY, LEAST, MOST, ODD, LaunchNumbers
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.sum_numbers import MaskKeys
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair
from evomerge.methods.task_vectors import task_vector_method


def mask(
    delta: Tensor,
    density: float,
    key: int,
    values: SourceValues | None = None,
    mergekit_compatible: bool = False,
) -> Tensor:
    """See `MaskFunction.__call__`: each entry with probability density in [0, 1]; values unused."""
    hashes = random_masks.hashed(random_masks.mixed(0, delta.numel(), delta.device), random_masks.split(key))
    return (hashes.long() < random_masks.bound(density)).to(delta.dtype).reshape(delta.shape)


def summand(pair: TensorPair, values: SourceValues, mask_key: int, tables: MagnitudeTables) -> Summand:
    """See `SummandFunction.__call__`."""
    bound = random_masks.bound(values["density"])
    keeps_all = bound == 1 << 31  # a density so near to 1 that no hash is above it
    return Summand(
        MaskKind.DENSE if keeps_all else MaskKind.RANDOM,
        values["weight"],
        key=random_masks.split(mask_key),
        bound=min(bound, (1 << 31) - 1),
    )


def mask_numbers(
    numbers: LaunchNumbers,
    rows: DifferenceRows,
    values: Mapping[str, Array],
    keys: MaskKeys | None,
    is_masked: Array,
) -> Array:
    """See `MaskNumbersFunction.__call__`."""
    assert keys is not None
    everything = 1 << 31
    bounds = np.minimum(everything, np.ceil(values["density"] * 2.0**32) - 2.0**31).astype(np.int64)
    numbers.integers[..., [KEY, ODD]] = keys.words
    numbers.integers[..., BOUND] = np.where(bounds == everything, MOST, bounds - 1)
    keeps_none = bounds <= LEAST  # no hash is below the least
    numbers.integers[keeps_none, ODD], numbers.integers[keeps_none, BOUND] = 0, -1
    norms = rows.hash_norms(keys.seed, keys.words, bounds, is_masked & (bounds < everything))
    if (bounds == everything).any():
        norms = np.where(bounds == everything, rows.wholes, norms)
    return norms


RANDOM = Sparsifier(mask, summand, randomized=True, masks=MaskNumbers(MaskKind.RANDOM, mask_numbers))
DARE_LINEAR = task_vector_method(
    "dare_linear",
    TaskVectorSum(RANDOM),
    normalize=False,
    rescale=True,
    paper="arXiv 2311.03099",
    summary="drop entries at random, rescale, sum",
)
DARE_TIES = task_vector_method(
    "dare_ties",
    TaskVectorSum(RANDOM, elect_sign=True),
    normalize=False,
    rescale=True,
    paper="arXiv 2311.03099, 2306.01708",
    summary="drop entries at random, rescale, elect a sign, sum those that agree",
)
