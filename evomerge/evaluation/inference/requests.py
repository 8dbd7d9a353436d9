"""What is asked of a model: the log-likelihood of a continuation after a context, in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """Score `continuation` [k], k >= 1, given `context` [c], c >= 1 unless the continuation was cut from the left."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def fitted(self, max_length: int) -> Request:
        """The request cut from the left to what a model of that many positions sees: its last max_length + 1 tokens.

        Raises ValueError for a continuation longer than max_length, as lm-eval does.
        """
        size = len(self.continuation)
        if size > max_length:
            raise ValueError(f"a continuation of {size} tokens is longer than the model's {max_length}")
        return Request(self.context[-(max_length + 1 - size) :], self.continuation)

    @property
    def inputs(self) -> tuple[int, ...]:
        """[c + k - 1] what the model is given: all but the last token."""
        return self.context + self.continuation[:-1]

    @property
    def first(self) -> int:
        """Position in `inputs` of the row that predicts the continuation's first token."""
        return len(self.context) - 1


def distinct(requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
    """(each different request once, for every request its number among them)."""
    numbers: dict[Request, int] = {}
    places = [numbers.setdefault(request, len(numbers)) for request in requests]
    return list(numbers), places


@dataclass(frozen=True, slots=True)
class Verification:
    """allowed: whether the technique gives this model's own numbers; reason: what was measured, or why it cannot run."""

    allowed: bool
    reason: str
