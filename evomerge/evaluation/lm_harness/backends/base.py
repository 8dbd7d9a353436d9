"""The protocol of a backend: what answers lm-eval's requests with one live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.inference.divergence import Distributions
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.target_logprobs import Rounding

Answers = list[list[Any]]
"""Of each request its responses, one a repeat: (log-likelihood, greedy) pairs, log-likelihoods or texts."""


class Backend(Protocol):
    """Answers requests with one live model, whose weights change from candidate to candidate.

    `prepare` is called once for a set of requests, `answer` once a candidate. A failure of the model is an
    exception: the worker turns it into an `Evaluation` with an error, and the backend stays usable for the
    next candidate.
    """

    def prepare(self, requests: Sequence[Any]) -> Any:
        """Does what can be done once: tokens, plans, tensors.

        Args:
            requests: lm-eval's `Instance` objects.

        Returns:
            What `answer` takes.

        Raises:
            CandidateError: The model cannot take a request at all.
        """
        ...

    def answer(self, prepared: Any, rounding: Rounding) -> Answers:
        """Answers prepared requests with the model's present weights.

        Args:
            prepared: Result of `prepare`.
            rounding: 'model' for lm-eval's rounding of log-likelihoods, 'float32' for sums that tie less.

        Returns:
            The responses of every request, in order.
        """
        ...

    def tokens(self, request: Any) -> int:
        """Counts the tokens that a log-likelihood request scores.

        Args:
            request: lm-eval's `Instance`.

        Returns:
            Their number, at least 1.
        """
        ...

    def optimizations(self) -> Mapping[str, Verification]:
        """Optimization -> whether it is used with this model, and why.

        Empty where there are none to choose from.
        """
        ...

    def close(self) -> None:
        """Releases the model: hooks are removed."""
        ...

    def fallback_reason(self, task: str) -> str | None:
        """Explains why a task's requests went through lm-eval's own path.

        Args:
            task: Name of a task with prepared requests.

        Returns:
            The reason; None if none did.
        """
        ...


@runtime_checkable
class DifferentiableBackend(Protocol):
    """A backend whose log-likelihoods have gradients."""

    def prepare_gradients(self, requests: Sequence[Any]) -> Any:
        """Does what can be done once, for log-likelihood requests alone.

        Args:
            requests: lm-eval's `Instance` objects.

        Returns:
            What `sums` and `backward` take.
        """
        ...

    def sums(self, prepared: Any) -> list[float]:
        """Scores prepared requests.

        Args:
            prepared: Result of `prepare_gradients`.

        Returns:
            The log-likelihood of each request, in nats, from float32 logits.
        """
        ...

    def backward(self, prepared: Any, slopes_of: Callable[[Sequence[float]], Sequence[float]]) -> None:
        """Adds the gradient of a loss of log-likelihoods to the model's parameters.

        Args:
            prepared: Result of `prepare_gradients`.
            slopes_of: Called once with the log-likelihood of each request, in nats, from float32 logits;
                returns the derivatives of the loss by them.
        """
        ...


@runtime_checkable
class RetainingBackend(Protocol):
    """A backend that can hold a model's next-token distributions near a teacher's; see `Retaining`."""

    def distributions(self, texts: Sequence[str]) -> Distributions:
        """Computes the model's distributions at every position of texts.

        Args:
            texts: As they would be a prompt.

        Returns:
            What `backward_divergence` takes.
        """
        ...

    def backward_divergence(self, teacher: Distributions, weights: Sequence[float]) -> list[float]:
        """Adds the gradient of a weighted sum of divergences to the model's parameters.

        Args:
            teacher: The distributions that the model should have.
            weights: Of each text's divergence.

        Returns:
            Each text's divergence.
        """
        ...


@runtime_checkable
class ShrinkableBackend(Protocol):
    """A backend that can answer with forwards that take less memory."""

    def halve_budgets(self) -> None:
        """Answers with half the tokens a forward from now on; what was prepared is to be prepared anew."""
        ...


@runtime_checkable
class SpanningBackend(Protocol):
    """A backend whose plans depend on how long requests become."""

    def expect(self, requests: Sequence[Any]) -> None:
        """Takes note of the longest requests that will come, so that it need not find out one by one.

        Args:
            requests: lm-eval's `Instance` objects, the longest of each task.
        """
        ...


@runtime_checkable
class EngineBackend(Protocol):
    """A backend that has another program generate texts, which is opened before candidates are timed."""

    def ready(self, prepared: Any) -> None:
        """Opens and checks what answering will need.

        Args:
            prepared: Result of `Backend.prepare`.

        Raises:
            EngineSetupError: It cannot be had or trusted.
        """
        ...

    def answered_by(self, task: str) -> str | None:
        """Describes what generates the texts of a task whose requests were prepared.

        Args:
            task: Its name.

        Returns:
            The engine, its version and settings; None where our own inference does.
        """
        ...


class BackendFactory(Protocol):
    """What a line of the registry names: a callable that wraps a live model."""

    def __call__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> Backend:
        """Wraps a model.

        Args:
            model: The live model.
            tokenizer: Its tokenizer.
            batch_size: Batch size of what goes through HFLM.

        Returns:
            The backend.
        """
        ...


class EngineBackendFactory(BackendFactory, Protocol):
    """A factory of the registry whose backends may have an engine."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int,
        engine: EngineSettings | None = None,
        prompts: Mapping[str, int] | None = None,
    ) -> Backend:
        """Wraps a model.

        Args:
            model: The live model.
            tokenizer: Its tokenizer.
            batch_size: Batch size of what goes through HFLM.
            engine: How the engine is opened; None for the defaults.
            prompts: Task -> items that a candidate may be scored on.

        Returns:
            The backend.
        """
        ...
