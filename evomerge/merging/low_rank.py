"""Sources that are the base with LoRA adapters: their task vectors as products of thin matrices.

With W_i = W_0 + B A the derivative of a loss by source i's weight is <G, B A> = sum_t (B^T g_t) . (A x_t), of
the inputs x_t and the gradients g_t of the outputs of the linear layer; no gradient of a weight is made.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.checkpoints.lora import AdaptedCheckpoint, LowRank
from evomerge.merging.parent_placement import PlacedParent
from evomerge.merging.tensor_plan import Step


def low_rank_task_vectors(
    step: Step, parents: Mapping[str, Parent], device: torch.device
) -> list[LowRank] | None:
    """Finds the task vectors of a step whose sources are all the base or adapters of it.

    Args:
        step: A step with a base and a mix.
        parents: Name -> parent.
        device: Where they are wanted.

    Returns:
        One for each source; None where one of them is another model, or replaces the tensor.
    """
    if step.mix is None or step.mix.base is None or step.base is None:
        return None
    base = _original(parents[step.mix.base[0]])
    if not isinstance(base, Checkpoint):
        return None
    found: list[LowRank] = []
    for (model, _), name in zip(step.mix.sources, step.inputs, strict=True):
        source = _original(parents[model])
        is_adapter = isinstance(source, AdaptedCheckpoint)
        difference = source.low_rank(name) if isinstance(source, AdaptedCheckpoint) else None
        if not is_adapter or difference is None or source.path != base.path or name != step.base:
            return None
        found.append(LowRank(difference.left.to(device), difference.right.to(device)))
    return found


def products(differences: Sequence[LowRank], inputs: Tensor, gradients: Tensor) -> list[float]:
    """Computes <G, left right> with G = sum_t g_t x_t^T.

    Args:
        differences: Of each source.
        inputs: [T, in] x_t.
        gradients: [T, out] g_t.

    Returns:
        One number for each source, of products in float32 that are summed in float64.
    """
    x, g = inputs.float(), gradients.float()
    return [
        float(((g @ difference.left) * (x @ difference.right.T)).sum(dtype=torch.float64))
        for difference in differences
    ]


def _original(parent: Parent) -> Parent:
    """A parent as it is on disk."""
    return parent.original if isinstance(parent, PlacedParent) else parent
