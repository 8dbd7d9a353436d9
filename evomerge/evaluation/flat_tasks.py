"""Tasks that tell no model from another: at their floor, where nothing is right, or of one value for all.

Nothing can be learnt from such a task, and often its prompt or its filter is at fault. Knows nothing of what
scores the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluation.objective import Term
from evomerge.evaluation.records import Evaluation, ItemScore

_MANY = 10
"""Items from which on it is taken for no accident that models are right and wrong on the same ones."""


@dataclass(frozen=True, slots=True)
class FlatTask:
    """A task on which all models score alike, item by item.

    Attributes:
        task: Name of the task or group.
        models: Names of the models, in order.
        items: Number of items that each was scored on.
        value: Value of every item, None where items differ from one another.
        higher_is_better: Direction of the metric.
        graded: Whether items have more values than right and wrong.
    """

    task: str
    models: tuple[str, ...]
    items: int
    value: float | None
    higher_is_better: bool
    graded: bool = False

    @property
    def is_certain(self) -> bool:
        """Whether this is no accident of few items that are right or wrong."""
        return self.items >= _MANY or self.graded

    @property
    def is_floor(self) -> bool:
        """Whether nothing is right."""
        return self.value == 0 and self.higher_is_better

    def sentence(self) -> str:
        """Says what was seen, without a full stop."""
        names = ", ".join(self.models)
        if self.is_floor:
            return f"task '{self.task}': 0 of {self.items} items right for each of {names}"
        if self.value is not None:
            return (
                f"task '{self.task}': each of {names} has {self.value:g} on every one of {self.items} items"
            )
        return f"task '{self.task}': each of {names} has the same value on every one of {self.items} items"


def find_flat_tasks(terms: Sequence[Term], evaluations: Mapping[str, Evaluation]) -> tuple[FlatTask, ...]:
    """Finds the tasks on which all models score alike.

    Args:
        terms: The tasks of an objective. Where a task is searched by a soft metric, that counts.
        evaluations: Model -> its evaluation, all on the same items; those that failed are passed over.

    Returns:
        The flat tasks, in the order of the terms. A single model has them only at their floor.
    """
    scored = {name: e.items for name, e in evaluations.items() if e.error is None}
    flat = (_flat(term, scored) for term in terms)
    return tuple(found for found in flat if found is not None)


def is_floor(items: Sequence[ItemScore], term: Term) -> bool:
    """Whether a model has nothing right in a task.

    Args:
        items: The model's scores.
        term: The task.

    Returns:
        True where it has items, all of value 0, and higher values are better.
    """
    tasks = {task for task, _ in term.strata}
    values = {score.value for score in items if score.task in tasks}
    return term.sign > 0 and values == {0.0}


def _flat(term: Term, scored: Mapping[str, Sequence[ItemScore]]) -> FlatTask | None:
    tasks = {task for task, _ in term.strata}
    by_model = [
        {(s.task, s.item): term.item_search_value(s) for s in items if s.task in tasks}
        for items in scored.values()
    ]
    if not by_model or not by_model[0] or any(values != by_model[0] for values in by_model):
        return None
    own = {s.value for items in scored.values() for s in items if s.task in tasks}
    found = FlatTask(
        term.task,
        tuple(scored),
        len(by_model[0]),
        own.pop() if len(own) == 1 else None,
        term.sign > 0,
        len(set(by_model[0].values())) > 2,
    )
    return found if len(by_model) > 1 or found.is_floor else None
