"""The protocol of a set of tasks, and several sets combined into one. Knows nothing of what scores them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.errors import TaskError
from evomerge.evaluation.evaluator import Answering, Differentiable, Evaluator, Preparing, Retaining
from evomerge.evaluation.records import Answer, GradientRequest, Items, ItemScore, Role

if TYPE_CHECKING:
    from torch import nn

    from evomerge.evaluation.inference.divergence import Distributions


def items_digest(ids: Sequence[str]) -> str:
    """Hashes item ids.

    Args:
        ids: Item ids; their order counts.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


class TaskSet(Evaluator, Protocol):
    """An evaluator that describes its tasks.

    A task that a search names may be a group of tasks with items (subtasks).
    """

    def sign(self, task: str) -> int:
        """Returns the direction of a task's metric.

        Args:
            task: Name of a task or group.

        Returns:
            +1 if higher values are better, else -1.
        """
        ...

    def metric(self, task: str) -> str:
        """Names a task's metric.

        Args:
            task: Name of a task or group.

        Returns:
            The metric's name, for people.
        """
        ...

    def filter(self, task: str) -> str | None:
        """Names the filter that takes an answer out of a generated text.

        Args:
            task: Name of a task or group.

        Returns:
            The filter's name; None where nothing is filtered, or not by one name.
        """
        ...

    def unit(self, task: str) -> str | None:
        """Names what a task's metric is counted in; metrics of one unit have a mean.

        Args:
            task: Name of a task or group.

        Returns:
            'a share between 0 and 1', 'a perplexity' and the like; None where it is not known.
        """
        ...

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """Lists the soft metrics that a task has beside its metric.

        Args:
            task: Name of a task or group.

        Returns:
            Some of 'probability' and 'logprob'.
        """
        ...

    def is_mean(self, task: str) -> bool:
        """Returns whether a task's metric is the mean of its items' values.

        Args:
            task: Name of a task or group.

        Returns:
            True if it is.
        """
        ...

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """Lists the tasks with items that a task or group consists of.

        Args:
            task: Name of a task or group.

        Returns:
            (task with items, its share) pairs, shares summing to one; a task that is no group is its own
            subtask.
        """
        ...

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """Lists what a user should know of the items.

        Args:
            model: If given, the items that this model truncates are named too.

        Returns:
            Sentences.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """Task named in the search -> SHA-256 of all that its scores depend on beside the model."""
        ...

    def sources(self) -> dict[str, dict[str, str]]:
        """Describes the code of tasks whose fingerprint does not hold it.

        Returns:
            Task named in the search -> file or package -> hash or version, what resume compares.
        """
        ...

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Describes what answers each task.

        Args:
            model: The live model.

        Returns:
            Task with items -> what answers it with this model.
        """
        ...

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Any]:
        """Verifies the optimizations of scoring on a model.

        Args:
            model: The live model.
            items: Task -> ids of the items that will be scored; their lengths count.

        Returns:
            Optimization -> its `Verification`.
        """
        ...

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """Collects what a model answers.

        Args:
            model: The live model.
            items: Task -> ids of the items to answer.

        Returns:
            Prompt, right answer and output of each item, where the task can show them.
        """
        ...

    def examples(self, count: int) -> list[tuple[str, str]]:
        """Returns some prompts of the search's items.

        Args:
            count: How many at most.

        Returns:
            (prompt, right answer) pairs, where the task has prompts.
        """
        ...


class CombinedTasks:
    """Several task sets as one: each is asked for its own tasks. Satisfies `TaskSet`.

    tasks = CombinedTasks([LmHarness(...), PythonTasks(...)])
    """

    def __init__(self, sets: Sequence[TaskSet]) -> None:
        """Combines task sets.

        Args:
            sets: The task sets, in the order of their scores.

        Raises:
            TaskError: A task is in two of them.
        """
        self._sets = tuple(sets)
        self._owner: dict[str, TaskSet] = {}
        for task_set in self._sets:
            for name in dict.fromkeys([*task_set.fingerprint(), *task_set.items("search")]):
                if name in self._owner:
                    raise TaskError(f"two tasks are called '{name}'; give one of them another name")
                self._owner[name] = task_set

    def items(self, role: Role) -> Items:
        """See `Evaluator.items`."""
        return {name: ids for task_set in self._sets for name, ids in task_set.items(role).items()}

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """See `Evaluator.score`. Items come in the order of the sets."""
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for task_set in self._sets:
            part = self._part(task_set, items)
            if part:
                part_scores, part_metrics = task_set.score(model, part)
                scores += part_scores
                metrics |= part_metrics
        return tuple(scores), metrics

    def backward(
        self, model: nn.Module, items: Items, request: GradientRequest
    ) -> tuple[tuple[ItemScore, ...], float]:
        """See `Differentiable.backward`. Raises TaskError for a task that has no differentiable loss."""
        scores: list[ItemScore] = []
        losses: list[float] = []
        for task_set in self._sets:
            part = self._part(task_set, items)
            if not part:
                continue
            part_scores, loss = _differentiable(task_set, part).backward(model, part, request)
            scores += part_scores
            losses.append(loss)
        return tuple(scores), math.fsum(losses)

    def distributions(self, model: nn.Module, texts: Sequence[str]) -> Distributions:
        """See `Retaining.distributions`. Raises TaskError where no set has them."""
        return self._retaining().distributions(model, texts)

    def backward_divergence(
        self, model: nn.Module, teacher: Distributions, weights: Sequence[float]
    ) -> list[float]:
        """See `Retaining.backward_divergence`. Raises TaskError where no set has them."""
        return self._retaining().backward_divergence(model, teacher, weights)

    def _retaining(self) -> Retaining:
        """The first set that knows how a text becomes tokens."""
        for task_set in self._sets:
            if isinstance(task_set, Retaining):
                return task_set
        raise TaskError("retain needs a task of lm-eval beside those of Python")

    def answers(
        self, model: nn.Module, items: Items
    ) -> tuple[tuple[ItemScore, ...], dict[str, float], tuple[Answer | None, ...]]:
        """See `Answering.answers`. Raises TaskError for a task that has no answers."""
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        answers: list[Answer | None] = []
        for task_set in self._sets:
            part = self._part(task_set, items)
            if not part:
                continue
            if not isinstance(task_set, Answering):
                raise TaskError(no_answers(next(iter(part))))
            part_scores, part_metrics, part_answers = task_set.answers(model, part)
            scores += part_scores
            metrics |= part_metrics
            answers += part_answers
        return tuple(scores), metrics, tuple(answers)

    def check_losses(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """See `Differentiable.check_losses`."""
        return tuple(
            warning
            for task_set in self._sets
            for warning in _differentiable(task_set, task_set.items("search")).check_losses(labels)
        )

    def prepare(self, model: nn.Module, items: Items) -> None:
        """See `Preparing.prepare`. Sets that need no preparation are left out."""
        for task_set in self._sets:
            part = self._part(task_set, items)
            if part and isinstance(task_set, Preparing):
                task_set.prepare(model, part)

    def sign(self, task: str) -> int:
        """See `TaskSet.sign`."""
        return self._owner[task].sign(task)

    def metric(self, task: str) -> str:
        """See `TaskSet.metric`."""
        return self._owner[task].metric(task)

    def filter(self, task: str) -> str | None:
        """See `TaskSet.filter`."""
        return self._owner[task].filter(task)

    def unit(self, task: str) -> str | None:
        """See `TaskSet.unit`."""
        return self._owner[task].unit(task)

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """See `TaskSet.soft_metrics`."""
        return self._owner[task].soft_metrics(task)

    def is_mean(self, task: str) -> bool:
        """See `TaskSet.is_mean`."""
        return self._owner[task].is_mean(task)

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """See `TaskSet.subtasks`."""
        return self._owner[task].subtasks(task)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """See `TaskSet.warnings`."""
        return tuple(warning for task_set in self._sets for warning in task_set.warnings(model))

    def fingerprint(self) -> dict[str, str]:
        """See `TaskSet.fingerprint`."""
        return {name: digest for task_set in self._sets for name, digest in task_set.fingerprint().items()}

    def sources(self) -> dict[str, dict[str, str]]:
        """See `TaskSet.sources`."""
        return {name: of for task_set in self._sets for name, of in task_set.sources().items()}

    def backends(self, model: nn.Module) -> dict[str, str]:
        """See `TaskSet.backends`."""
        return {
            name: backend for task_set in self._sets for name, backend in task_set.backends(model).items()
        }

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Any]:
        """See `TaskSet.optimizations`."""
        verifications: dict[str, Any] = {}
        for task_set in self._sets:
            verifications |= task_set.optimizations(model, self._part(task_set, items))
        return verifications

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """See `TaskSet.samples`."""
        return [
            sample
            for task_set in self._sets
            for sample in task_set.samples(model, self._part(task_set, items))
        ]

    def examples(self, count: int) -> list[tuple[str, str]]:
        """See `TaskSet.examples`. They come from the first set that has any."""
        for task_set in self._sets:
            examples = task_set.examples(count)
            if examples:
                return examples
        return []

    def _part(self, task_set: TaskSet, items: Items) -> dict[str, Sequence[str]]:
        """The items that belong to one of the sets."""
        return {name: ids for name, ids in items.items() if self._owner[name] is task_set}


def check_losses(tasks: TaskSet, labels: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Checks that each task has a loss that a learned stage can climb.

    Args:
        tasks: The tasks of a search.
        labels: Task or group -> whose answers stand for the right ones; its own for the others.

    Returns:
        Sentences that a user should read.

    Raises:
        TaskError: A task has no text with a right answer; names it.
    """
    by_subtask = {
        subtask: source for task, source in (labels or {}).items() for subtask, _ in tasks.subtasks(task)
    }
    return _differentiable(tasks, tasks.items("search")).check_losses(by_subtask)


def no_answers(task: str) -> str:
    """Says that a task has no answers that could be labels.

    Args:
        task: Its name.

    Returns:
        A sentence with the remedy.
    """
    return (
        f"task '{task}' is a Python function, whose answers are not known, so they cannot be labels; "
        "give it a loss, or leave it out with labels: none"
    )


def _differentiable(tasks: TaskSet, items: Items) -> Differentiable:
    """The set itself, which is to be scored on items; raises TaskError where it has no losses."""
    if not isinstance(tasks, Differentiable):
        raise TaskError(
            f"task '{next(iter(items))}' has no text with a right answer, so a learned stage has no loss for "
            "it; search weights instead, or leave the task out"
        )
    return tasks
