"""Stages that learn the weights of a merge by the gradient of a differentiable score."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.errors import ConfigError
from evomerge.launch.learned_spaces import GENOMES, genome_for
from evomerge.launch.stage_request import StageRequest
from evomerge.methods.task_vector_slopes import has_slopes
from evomerge.search import LearnedOpening, Start

_SHARD = 64  # items that one worker scores with their slopes at once
_ITEMS, _RATE = 30, 0.05


def open_learned_stage(request: StageRequest) -> Callable[[Start], LearnedOpening]:
    """Opens a learned stage.

    Args:
        request: The stage; it begins at the best merge so far of the search's method.

    Returns:
        A function from what the stages before came to to the open stage.

    Raises:
        ConfigError: The method has no known derivatives, or nothing in the genome changes the merge.
    """
    stage = request.stage
    if not has_slopes(request.space.method):
        raise ConfigError(
            f"a learned stage needs a sum of task vectors with weights, and '{request.space.method.name}' is "
            "none; use task_arithmetic, ties, dare_linear or linear, or a stage of weights"
        )
    genome = GENOMES[stage.genome or genome_for(request.fewest_items)]
    opening = LearnedOpening(
        space=genome.make(request.space, request.parents),
        summary=genome.summary,
        steps=request.evaluations,
        rate=stage.rate or _RATE,
        items=stage.items or _ITEMS,
        shard=_SHARD,
        surrogate=stage.surrogate or "logprob",
    )
    return lambda start: opening
