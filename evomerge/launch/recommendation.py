"""Which stage, genome and steps a search is recommended, from what was measured at equal cost.

The measurements are those of results/search_quality.md, on two families of small models.
"""

from __future__ import annotations

from typing import Any

from evomerge.config import Config
from evomerge.errors import TaskError
from evomerge.evaluation import FORWARDS_OF_A_SLOPE, Items, TaskSet
from evomerge.evaluation.task_set import check_losses
from evomerge.launch.learned_spaces import ITEMS_FOR_TENSORS, genome_for
from evomerge.methods import Method, method
from evomerge.methods.task_vector_slopes import has_slopes

_ITEMS = 30  # of each task in a step, as measured
_FEW_ITEMS, _FEW_STEPS = 15, 26  # so many items make so few steps more, which is better: see `_items`
_STEPS = (10, 110)  # fewest and most that were measured
_LEARNED = (
    "on two families of small models a learned stage scored above evolution of the same weights at every "
    "budget that was measured, and evolution after it added nothing that was shown "
    "(results/search_quality.md); on the one real model that was tried it did not (results/real_learned.md)"
)


def recommend(
    rule: Method, no_loss: str, tasks: int, fewest_items: int, item_forwards: int
) -> dict[str, Any]:
    """Recommends a first stage.

    Args:
        rule: The search's method.
        no_loss: Why a task has no differentiable loss; '' where all have one.
        tasks: Number of tasks.
        fewest_items: Search items of the task that has the fewest.
        item_forwards: Budget of the search.

    Returns:
        `stage`: an entry of `stages` of a search file; `item_forwards`: what it costs; `reasons`: sentences.
    """
    if not has_slopes(rule):
        reason = f"'{rule.name}' is no sum of task vectors with weights, so its coefficients have no gradient"
        return _evolution(item_forwards, reason)
    if no_loss:
        return _evolution(item_forwards, no_loss)
    items = min(_items(tasks, item_forwards), fewest_items)
    of_a_step = FORWARDS_OF_A_SLOPE * items * tasks
    least, most = _STEPS
    steps = max(least, min(most, item_forwards // of_a_step))
    genome = genome_for(fewest_items)
    few = f"{fewest_items} search items in the task that has the fewest: "
    sized = f"{few}from {ITEMS_FOR_TENSORS} on a weight for each tensor is ahead, below it the space's axes"
    stage = {"stage": "learned", "genome": genome, "steps": steps, "items": items}
    reasons = [_LEARNED, sized]
    if items == _FEW_ITEMS < min(_ITEMS, fewest_items):
        reasons.append(
            f"{_FEW_STEPS} steps of {_FEW_ITEMS} items a task scored above {_FEW_STEPS // 2} of {_ITEMS}"
        )
    if steps == most:
        reasons.append(f"more than {most} steps were not measured")
    if steps * of_a_step > item_forwards:
        reasons.append(f"fewer than {least} steps were not measured")
    return {"stage": stage, "item_forwards": steps * of_a_step, "reasons": reasons}


def recommendation(settings: Config, tasks: TaskSet, items: Items, item_forwards: int) -> dict[str, Any]:
    """Recommends a first stage for a search.

    Args:
        settings: Of the search.
        tasks: Its tasks.
        items: Task -> ids of all its search items.
        item_forwards: Budget of its stages.

    Returns:
        See `recommend`.
    """
    if settings.chooses_methods:
        return _evolution(item_forwards, "a choice of methods has no gradient")
    no_loss = ""
    try:
        check_losses(tasks)
    except TaskError as error:
        no_loss = str(error)
    fewest = min(map(len, items.values()))
    return recommend(method(settings.methods[0]), no_loss, len(items), fewest, item_forwards)


def _items(tasks: int, item_forwards: int) -> int:
    """Items of a task in a step: fewer where the budget has few steps."""
    has_few_steps = item_forwards < _FEW_STEPS * FORWARDS_OF_A_SLOPE * _ITEMS * tasks
    return _FEW_ITEMS if has_few_steps else _ITEMS


def _evolution(item_forwards: int, reason: str) -> dict[str, Any]:
    """A stage of weights, since there is no gradient."""
    return {"stage": {"stage": "weights"}, "item_forwards": item_forwards, "reasons": [reason]}
