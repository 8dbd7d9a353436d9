"""Stages that learn the weights of a merge by the gradient of a differentiable score, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from evomerge.checkpoints import Parent, equal_tensors
from evomerge.errors import ConfigError
from evomerge.launch.stage_request import StageRequest
from evomerge.merging.merge import Merge
from evomerge.methods.task_vector_slopes import has_slopes
from evomerge.search import LearnedOpening, Start
from evomerge.spaces import WeightSpace
from evomerge.spaces.tensor_weights import WEIGHT, TensorWeight, TensorWeightSpace

_SHARD = 64  # items that one worker scores with their slopes at once
_ITEMS, _RATE = 30, 0.05


def open_learned_stage(request: StageRequest) -> Callable[[Start], LearnedOpening]:
    """Opens a learned stage.

    Args:
        request: The stage; it begins at the best merge so far of the search's method.

    Returns:
        A function from what the stages before came to to the open stage.

    Raises:
        ConfigError: The method has no known derivatives.
    """
    stage = request.stage
    if not has_slopes(request.space.method):
        raise ConfigError(
            f"a learned stage needs a sum of task vectors with weights, and '{request.space.method.name}' is "
            "none; use task_arithmetic, ties, dare_linear or linear, or a stage of weights"
        )
    space = make_tensor_space(request.space, request.parents)
    opening = LearnedOpening(
        space=space,
        steps=request.evaluations,
        rate=stage.rate or _RATE,
        items=stage.items or _ITEMS,
        shard=_SHARD,
        surrogate=stage.surrogate or "logprob",
    )
    return lambda start: opening


def make_tensor_space(space: WeightSpace, parents: Mapping[str, Parent]) -> TensorWeightSpace:
    """The space of one weight for each tensor and parent, of the method and models of a space of weights.

    Args:
        space: The search's space of weights.
        parents: Its models, open.

    Returns:
        The space, without the tensors in which a parent equals the base.

    Raises:
        ConfigError: A parent names its tensors so differently that a filter by name would not find them.
    """
    merge = Merge(space.decode(space.start), parents)
    base = parents[space.base]
    equal = {model: set(equal_tensors(base, parents[model])) for model in space.models}
    axes: list[TensorWeight] = []
    for step in merge.steps:
        if step.mix is None or not step.info.dtype.startswith(("F", "BF")):
            continue
        place = base.layout.place(step.name)
        text = step.name
        if place.layer is not None:
            text = place.suffix
        for (model, _), name in zip(step.mix.sources, step.inputs, strict=True):
            if space.method.needs_base and step.name in equal[model]:
                continue
            if text not in name:
                raise ConfigError(
                    f"'{model}' calls '{step.name}' of the base '{name}'; a learned stage names tensors by "
                    "their names in the base, so search weights instead"
                )
            axes.append(TensorWeight(step.name, text, place.layer, place.part == "head", model))
    fixed = {name: bounds.start for name, bounds in space.ranges.items() if name != WEIGHT}
    start = space.ranges[WEIGHT].start
    return TensorWeightSpace(
        method=space.method,
        base=space.base,
        models=space.models,
        depth=base.layout.num_layers,
        axes=tuple(axes),
        fixed=tuple(sorted(fixed.items())),
        start_weight=start,
        out_dtype=space.out_dtype,
        seed=space.seed,
    )
