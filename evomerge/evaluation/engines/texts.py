"""Greedy texts from an engine, which stop where lm-eval's HFLM stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from evomerge.errors import CandidateError
from evomerge.evaluation.engines.engine import TextEngine


@dataclass(slots=True)
class Text:
    """A generated text.

    Attributes:
        tokens: Token ids, the one that ends it included.
        logprobs: Log-probability of each, in nats.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def generate(
    engine: TextEngine,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_ids: Collection[int],
    hits: Callable[[Sequence[int]], bool],
) -> list[Text]:
    """Generates a text after each prompt.

    Args:
        engine: Holds the weights.
        prompts: Token ids.
        limits: Most new tokens of each.
        end_ids: Token ids that end a text.
        hits: Called with all tokens of a text after each of them: whether a stop string ends it.

    Returns:
        The texts, in order.

    Raises:
        CandidateError: A log-probability is NaN, as where logits are.
    """
    texts = [Text() for _ in prompts]
    running = set(range(len(prompts)))
    engine.start(prompts, limits, sorted(end_ids))
    while running:
        stopped = []
        for progress in engine.step():
            if progress.row not in running:
                continue
            text = texts[progress.row]
            for token, logprob in zip(progress.tokens, progress.logprobs, strict=True):
                if math.isnan(logprob):
                    engine.abort(sorted(running))
                    raise CandidateError("the model's logits are NaN")
                text.tokens.append(token)
                text.logprobs.append(logprob)
                if token not in end_ids and hits(text.tokens):
                    stopped.append(progress.row)
                    break
            if progress.is_finished or progress.row in stopped:
                running.discard(progress.row)
        if stopped:
            engine.abort(stopped)
    return texts
