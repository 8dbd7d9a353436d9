"""Log-likelihood requests in token ids, and the result of verifying an optimization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for the log-likelihood of a continuation after a context.

    Attributes:
        context: [c] token ids, c >= 1 unless the continuation was cut from the left.
        continuation: [k] token ids, k >= 1.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def fitted(self, max_length: int) -> Request:
        """Cuts the request from the left to what a model sees.

        Args:
            max_length: Number of the model's positions.

        Returns:
            The request with at most its last max_length + 1 tokens.

        Raises:
            ValueError: The continuation alone is longer than max_length, which lm-eval refuses too.
        """
        size = len(self.continuation)
        if size > max_length:
            raise ValueError(f"a continuation of {size} tokens is longer than the model's {max_length}")
        return Request(self.context[-(max_length + 1 - size) :], self.continuation)

    @property
    def inputs(self) -> tuple[int, ...]:
        """[c + k - 1] token ids that the model is given: all but the last."""
        return self.context + self.continuation[:-1]

    @property
    def first(self) -> int:
        """Position in `inputs` of the row that predicts the continuation's first token."""
        return len(self.context) - 1


def distinct(requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
    """Removes repeated requests.

    Args:
        requests: Any requests.

    Returns:
        (each different request once, for every given request its index among them).
    """
    numbers: dict[Request, int] = {}
    places = [numbers.setdefault(request, len(numbers)) for request in requests]
    return list(numbers), places


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether an optimization can be trusted with a model.

    Attributes:
        allowed: Whether it gives the model's own numbers.
        reason: What was measured, or why it cannot run.
    """

    allowed: bool
    reason: str
