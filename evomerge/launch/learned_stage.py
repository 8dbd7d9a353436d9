"""Stages that learn the weights of a merge by the gradient of a differentiable score."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.errors import ConfigError
from evomerge.launch.learned_spaces import GENOMES, genome_for
from evomerge.launch.retained_texts import read_texts
from evomerge.launch.stage_request import StageRequest
from evomerge.methods.task_vector_slopes import has_slopes
from evomerge.optimizers.descent import Leash
from evomerge.search import LearnedOpening, Start
from evomerge.search.plan import EarlyStopping, RetainedTexts
from evomerge.spaces import WeightSpace, baselines, first_method

_SHARD = 64  # items that one worker scores with their slopes at once
_ITEMS, _RATE = 30, 0.1  # chosen on the demo's validation items, see results/search_quality.md
_RETAIN_ITEMS, _RETAIN_WEIGHT = 64, 1.0


def open_learned_stage(request: StageRequest) -> Callable[[Start], LearnedOpening]:
    """Opens a learned stage.

    Args:
        request: The stage; it begins at the best merge so far of the search's method.

    Returns:
        A function from what the stages before came to to the open stage.

    Raises:
        ConfigError: The method has no known derivatives, or nothing in the genome changes the merge.
    """
    stage, space = request.stage, request.space
    assert isinstance(space, WeightSpace)  # the search file's checks refuse a choice of methods
    if not has_slopes(space.method):
        raise ConfigError(
            f"a learned stage needs a sum of task vectors with weights, and '{space.method.name}' is "
            "none; use task_arithmetic, ties, dare_linear or linear, or a stage of weights"
        )
    name = stage.genome or genome_for(request.fewest_items)
    genome = GENOMES[name]
    opening = LearnedOpening(
        space=genome.make(space, request.parents),
        summary=genome.summary,
        steps=request.evaluations,
        rate=stage.rate or _RATE,
        items=stage.items or _ITEMS,
        shard=_SHARD,
        surrogate=stage.surrogate or "logprob",
        labels=dict(stage.labels or {}),
        leash=Leash(stage.decay or 0.0, stage.trust, stage.trust_rms),
        retained=_retained(request),
        stopping=EarlyStopping(stage.check, stage.patience) if stage.check else None,
    )
    return lambda start: opening


def _retained(request: StageRequest) -> RetainedTexts | None:
    """The texts that a stage retains, with the teacher that it names."""
    stage = request.stage
    if stage.retain is None:
        return None
    teacher = None
    if stage.teacher is not None:
        named = (
            b
            for b in baselines(first_method(request.space))
            if b.origin == "parent" and b.label == stage.teacher
        )
        teacher = next(named).recipe
    weight = _RETAIN_WEIGHT if stage.retain_weight is None else stage.retain_weight
    return RetainedTexts(read_texts(stage.retain), weight, stage.retain_items or _RETAIN_ITEMS, teacher)
