"""Sources that are the base with LoRA adapters: their task vectors as products of thin matrices.

With W_i = W_0 + B A the derivative of a loss by source i's weight is <G, B A> = sum_t (B^T g_t) . (A x_t), of
the inputs x_t and the gradients g_t of the outputs of the linear layer; no gradient of a weight is made.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint, LowRank
from evomerge.merging.parent_placement import PlacedParent
from evomerge.merging.tensor_plan import Step


@dataclass(frozen=True, slots=True)
class LowRankTaskVectors:
    """The task vectors of one tensor, side by side in float32.

    Attributes:
        left: [out, R] of all sources.
        right: [in, R].
        ranks: Of each source; R is their sum.
    """

    left: Tensor
    right: Tensor
    ranks: tuple[int, ...]

    def products(self, inputs: Tensor, gradients: Tensor) -> list[float]:
        """Computes <G, task vector> of each source with G = sum_t g_t x_t^T.

        Args:
            inputs: [T, in] x_t.
            gradients: [T, out] g_t.

        Returns:
            One number for each source, of products in float32 that are summed in float64.
        """
        pairs = (gradients.float() @ self.left) * (inputs.float() @ self.right)
        columns = torch.split(pairs.sum(0, dtype=torch.float64), list(self.ranks))
        return [math.fsum(own.tolist()) for own in columns]


def low_rank_task_vectors(
    step: Step, parents: Mapping[str, Parent], device: torch.device
) -> LowRankTaskVectors | None:
    """Finds the task vectors of a step whose sources are all the base or adapters of it.

    Args:
        step: A step with a base and a mix.
        parents: Name -> parent.
        device: Where they are wanted.

    Returns:
        Those of all sources; None where one of them is another model, or replaces the tensor.
    """
    if step.mix is None or step.mix.base is None or step.base is None:
        return None
    base = _original(parents[step.mix.base[0]])
    if not isinstance(base, Checkpoint):
        return None
    found: list[LowRank] = []
    for (model, _), name in zip(step.mix.sources, step.inputs, strict=True):
        source = _original(parents[model])
        if not isinstance(source, AdaptedCheckpoint) or source.path != base.path or name != step.base:
            return None
        difference = source.low_rank(name)
        if difference is None:
            return None
        found.append(difference)
    left, right = [own.left for own in found], [own.right.T for own in found]
    ranks = tuple(own.left.shape[1] for own in found)
    return LowRankTaskVectors(torch.cat(left, 1).to(device), torch.cat(right, 1).to(device), ranks)


def _original(parent: Parent) -> Parent:
    """A parent as it is on disk."""
    return parent.original if isinstance(parent, PlacedParent) else parent
