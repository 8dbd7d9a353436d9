"""What a search asks of its tasks, and several sets of tasks as one. Knows nothing of what scores them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import TaskError
from evomerge.evaluation.evaluator import Evaluator, Preparing
from evomerge.evaluation.records import Items, ItemScore, Role

if TYPE_CHECKING:
    from torch import nn


def items_digest(ids: Sequence[str]) -> str:
    """SHA-256 of item ids, in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


class TaskSet(Evaluator, Protocol):
    """An evaluator that can say what its tasks are. A task named in a search may be a group of tasks with items."""

    def sign(self, task: str) -> int:
        """+1 if higher values of the task's metric are better, else -1."""
        ...

    def metric(self, task: str) -> str:
        """Name of the task's metric."""
        ...

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """Soft scores that the task has beside its metric: of 'probability' and 'logprob'."""
        ...

    def is_mean(self, task: str) -> bool:
        """Whether the task's metric is the mean of its items' values."""
        ...

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """(task with items, its share) of a group, shares summing to one; a task is its own leaf."""
        ...

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """Sentences about the items that a user should read; given a model, also which it truncates."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Task named in the search -> SHA-256 of all that its scores depend on beside the model."""
        ...

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Task with items -> what answers it with this model."""
        ...

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Any]:
        """Technique -> verdict on its use with this model."""
        ...

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """Prompt, right answer and output of each item, where the task can show them."""
        ...

    def examples(self, count: int) -> list[tuple[str, str]]:
        """(prompt, right answer) of up to `count` items of the search, where the task has prompts."""
        ...


class CombinedTasks:
    """Several sets of tasks as one: each is asked for its own. Satisfies `TaskSet`."""

    def __init__(self, sets: Sequence[TaskSet]) -> None:
        """Raises TaskError for a task that is in two of them."""
        self._sets = tuple(sets)
        self._owner: dict[str, TaskSet] = {}
        for one in self._sets:
            for name in dict.fromkeys([*one.fingerprint(), *one.items("search")]):
                if name in self._owner:
                    raise TaskError(f"two tasks are called '{name}'; give one of them another name")
                self._owner[name] = one

    def items(self, role: Role) -> Items:
        """All items of a role."""
        return {name: ids for one in self._sets for name, ids in one.items(role).items()}

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item values in the order of the sets, and the metric of each task."""
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for one in self._sets:
            own = self._own(one, items)
            if own:
                found, values = one.score(model, own)
                scores += found
                metrics |= values
        return tuple(scores), metrics

    def prepare(self, model: nn.Module, items: Items) -> None:
        """Each set that can be."""
        for one in self._sets:
            if isinstance(one, Preparing) and (own := self._own(one, items)):
                one.prepare(model, own)

    def sign(self, task: str) -> int:
        """Its own set's answer."""
        return self._owner[task].sign(task)

    def metric(self, task: str) -> str:
        """Its own set's answer."""
        return self._owner[task].metric(task)

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """Its own set's answer."""
        return self._owner[task].soft_metrics(task)

    def is_mean(self, task: str) -> bool:
        """Its own set's answer."""
        return self._owner[task].is_mean(task)

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """Its own set's answer."""
        return self._owner[task].subtasks(task)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """Those of all sets."""
        return tuple(finding for one in self._sets for finding in one.warnings(model))

    def fingerprint(self) -> dict[str, str]:
        """Those of all sets."""
        return {name: digest for one in self._sets for name, digest in one.fingerprint().items()}

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Those of all sets."""
        return {name: answer for one in self._sets for name, answer in one.backends(model).items()}

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Any]:
        """Those of all sets."""
        return {
            name: verdict
            for one in self._sets
            for name, verdict in one.optimizations(model, self._own(one, items)).items()
        }

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """Those of all sets."""
        return [sample for one in self._sets for sample in one.samples(model, self._own(one, items))]

    def examples(self, count: int) -> list[tuple[str, str]]:
        """Those of the first set that has any."""
        return next((found for one in self._sets if (found := one.examples(count))), [])

    def _own(self, one: TaskSet, items: Items) -> dict[str, Sequence[str]]:
        return {name: ids for name, ids in items.items() if self._owner[name] is one}
