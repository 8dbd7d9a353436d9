"""Protocols of what scores a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from evomerge.evaluation.records import Answer, GradientRequest, Items, ItemScore, Role

if TYPE_CHECKING:
    from torch import nn

    from evomerge.evaluation.inference.divergence import Distributions


class Evaluator(Protocol):
    """Scores a live model on items.

    An evaluator raises any exception where scoring is impossible; the worker turns it into an `Evaluation`
    with an error.
    """

    def items(self, role: Role) -> Items:
        """Lists all items of a role.

        Args:
            role: 'search', 'validation' or 'test'.

        Returns:
            Task -> item ids, always in the same order. Roles share no items.
        """
        ...

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Scores a model.

        Args:
            model: Live model, whose weights change from candidate to candidate.
            items: Task -> ids of the items to score.

        Returns:
            Per-item scores, and metrics by task (with soft metrics, see `Evaluation.metrics`).
        """
        ...


@runtime_checkable
class Differentiable(Protocol):
    """An evaluator whose tasks have a loss that a model's parameters have gradients of."""

    def check_losses(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Checks that each task has a loss, in so far as its first search items show.

        Args:
            labels: Task -> whose answers stand for the right ones, see `evomerge.search.labels`; its own for
                the others.

        Returns:
            Sentences that a user should read.

        Raises:
            TaskError: A task has no text with a right answer.
        """
        ...

    def backward(
        self, model: nn.Module, items: Items, request: GradientRequest
    ) -> tuple[tuple[ItemScore, ...], float]:
        """Scores items by their loss and runs its backward pass, where derivatives are wanted.

        Args:
            model: Live model; gradients go to its parameters that require one.
            items: Task -> ids of the items.
            request: The loss.

        Returns:
            Per-item scores, whose value is the probability of the right answer, and the loss.

        Raises:
            TaskError: A task has no text with a right answer, so that it has no loss.
        """
        ...


@runtime_checkable
class Retaining(Protocol):
    """An evaluator that can hold a model's next-token distributions near a teacher's on texts."""

    def distributions(self, model: nn.Module, texts: Sequence[str]) -> Distributions:
        """Computes a model's distributions at every position of texts.

        Args:
            model: Live model.
            texts: As they would be a prompt.

        Returns:
            What `backward_divergence` takes.

        Raises:
            TaskError: The backend has no gradients.
        """
        ...

    def backward_divergence(
        self, model: nn.Module, teacher: Distributions, weights: Sequence[float]
    ) -> list[float]:
        """Computes how far a model is from a teacher and runs the backward pass.

        Args:
            model: Live model; gradients go to its parameters that require one.
            teacher: The teacher's distributions.
            weights: Of each text's divergence in the loss.

        Returns:
            Each text's divergence, the mean over its positions of KL(teacher || model) in nats.

        Raises:
            TaskError: The backend has no gradients.
        """
        ...


@runtime_checkable
class Answering(Protocol):
    """An evaluator that can say what a model answers."""

    def answers(
        self, model: nn.Module, items: Items
    ) -> tuple[tuple[ItemScore, ...], dict[str, float], tuple[Answer | None, ...]]:
        """Scores a model, and collects what it answers.

        Args:
            model: Live model.
            items: Task -> ids of the items to answer.

        Returns:
            Scores and metrics as `Evaluator.score` gives them; the greedy answer to each item, None where it
            is empty or was cut off.

        Raises:
            TaskError: A task has no answers.
        """
        ...


@runtime_checkable
class Preparing(Protocol):
    """An evaluator that can prepare a model once: build plans and verify optimizations."""

    def prepare(self, model: nn.Module, items: Items) -> None:
        """Prepares a model for scoring items.

        Args:
            model: Live model. When it is scored it may have other weights, and layers of the same kinds in
                another order.
            items: Task -> ids of the items that will be scored.
        """
        ...
