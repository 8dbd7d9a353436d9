"""DARE (Yu et al. 2024, arXiv 2311.03099): drop entries of the task vectors at random, rescale the rest.

Masks are keyed, not drawn (see `hashing`), and they nest: what density .3 keeps, density .5 keeps too. The rescale
matches the L1 norm, as mergekit does since 2025, not the paper's 1/density. mergekit draws from one global generator,
so its masks depend on the order of the models and on the device; the two agree in distribution only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from evomerge.methods import random_masks, task_vectors
from evomerge.methods.declaration import TaskVectorSum


def keep(
    delta: Tensor,
    density: float,
    key: int,
    own: Mapping[str, float] | None = None,
    mergekit_compatible: bool = False,
) -> Tensor:
    """0/1 mask that keeps each entry with probability density in [0, 1]; same shape and dtype as delta."""
    u = random_masks.hashed(random_masks.mixed(0, delta.numel(), delta.device), random_masks.split(key))
    return (u.long() < random_masks.bound(density)).to(delta.dtype).reshape(delta.shape)


DARE_LINEAR = task_vectors.method(
    "dare_linear",
    TaskVectorSum(sparsify="random"),
    keep,
    normalize=False,
    rescale=True,
    paper="arXiv 2311.03099",
    summary="drop entries at random, rescale, sum",
)
DARE_TIES = task_vectors.method(
    "dare_ties",
    TaskVectorSum(sparsify="random", elect_sign=True),
    keep,
    normalize=False,
    rescale=True,
    paper="arXiv 2311.03099, 2306.01708",
    summary="drop entries at random, rescale, elect a sign, sum those that agree",
)
