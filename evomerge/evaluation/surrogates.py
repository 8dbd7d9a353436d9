"""Differentiable stand-ins for a task's metric: an item's loss from log-likelihoods of texts, and its slopes.

A choice is scored by the probability of its right choices among all of them; an answer by the probability
that exactly it is generated, which is the sum over right answers and over what may end them; a text by its
mean log-probability of a token. Answers and choices are summed log-probabilities, never means of tokens,
which would favour long answers. The margin of a choice compares the likeliest right choice with the likeliest
wrong one, so that it is above a half exactly where the likeliest choice is right. The entropy of the model's
own distribution is no surrogate: it falls as a model grows sure of wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Surrogate = Literal["logprob", "probability", "margin"]
SURROGATES: tuple[Surrogate, ...] = ("logprob", "probability", "margin")
"""'logprob' is minus the logarithm of the right answer's probability, 'probability' one minus it; 'margin' is
one minus the logistic function of the difference between the log-likelihoods of the likeliest right and the
likeliest wrong choice. Against all other texts together, that is the probability of a generated answer."""


@dataclass(frozen=True, slots=True)
class ItemLoss:
    """The loss of one item.

    Attributes:
        loss: At least 0; lower is better.
        slopes: Its derivative by the log-likelihood of each text, in their order.
        probability: Of the right answer, in [0, 1]; None for a text.
        logprob: Logarithm of it; of a text the mean log-probability of a token.
    """

    loss: float
    slopes: tuple[float, ...]
    probability: float | None
    logprob: float


def of_choices(sums: Sequence[float], right: Sequence[int], surrogate: Surrogate) -> ItemLoss:
    """Computes the loss of a multiple choice.

    Args:
        sums: Log-likelihood of each choice, in nats.
        right: Indices of the right choices, at least one.
        surrogate: What is climbed.

    Returns:
        The loss, from the softmax over the choices; of a margin from its two likeliest choices, and 0 where
        all are right.
    """
    total = _log_sum([*sums])
    among = [math.exp(s - total) for s in sums]
    log_right = _log_sum([sums[i] for i in right]) - total
    probability = math.exp(log_right)
    if surrogate == "margin":
        return _margin(sums, right, probability, log_right)
    share = [math.exp(s - total - log_right) if i in right else 0.0 for i, s in enumerate(sums)]
    by_log = [p - own for p, own in zip(among, share, strict=True)]  # of -log P
    return _item_loss(by_log, log_right, probability, surrogate)


def of_answers(sums: Sequence[float], surrogate: Surrogate) -> ItemLoss:
    """Computes the loss of a generated answer.

    Args:
        sums: Log-likelihood of each text that would be right, no one of them the beginning of another.
        surrogate: What is climbed.

    Returns:
        The loss, from the probability that one of them is generated.
    """
    log_right = _log_sum([*sums])
    by_log = [-math.exp(s - log_right) for s in sums]
    return _item_loss(by_log, log_right, math.exp(log_right), surrogate)


def of_text(total: float, tokens: int) -> ItemLoss:
    """Computes the loss of a text without a prompt.

    Args:
        total: Its log-likelihood in nats.
        tokens: That it has.

    Returns:
        The loss: minus the mean log-probability of a token.
    """
    return ItemLoss(-total / tokens, (-1.0 / tokens,), None, total / tokens)


def _margin(sums: Sequence[float], right: Sequence[int], probability: float, log_right: float) -> ItemLoss:
    """The margin of a multiple choice; of equal choices the first counts."""
    wrong = [i for i in range(len(sums)) if i not in right]
    slopes = [0.0] * len(sums)
    if not wrong:
        return ItemLoss(0.0, tuple(slopes), probability, log_right)
    best, rival = max(right, key=lambda i: sums[i]), max(wrong, key=lambda i: sums[i])
    loss = _logistic(sums[rival] - sums[best])
    slope = loss * _logistic(sums[best] - sums[rival])
    slopes[best], slopes[rival] = -slope, slope
    return ItemLoss(loss, tuple(slopes), probability, log_right)


def _logistic(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _item_loss(
    by_log: Sequence[float], log_right: float, probability: float, surrogate: Surrogate
) -> ItemLoss:
    """by_log: derivatives of minus the logarithm of the probability."""
    if surrogate == "logprob":
        return ItemLoss(-log_right, tuple(by_log), probability, log_right)
    slopes = tuple(probability * slope for slope in by_log)
    return ItemLoss(1.0 - probability, slopes, probability, log_right)


def _log_sum(values: Sequence[float]) -> float:
    """log of the sum of exponentials."""
    top = max(values)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(value - top) for value in values))
