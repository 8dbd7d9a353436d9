"""How far a live model's next-token distributions are from a teacher's on texts, and its backward pass.

Knows token ids alone. A text's divergence is the mean over its positions of KL(teacher || model), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.evaluation.inference.forward import MAX_LOGITS, Forward

MAX_NUMBERS = 1 << 28
"""Log-probabilities of a teacher that are held, a number for each position and token of the vocabulary."""
_TOKENS = 4096  # inputs of one forward


@dataclass(frozen=True, slots=True)
class Distributions:
    """A teacher's next-token distributions.

    Attributes:
        ids: Token ids of each text, at least one.
        logprobs: Of each text [tokens, vocabulary] in float32 or wider, on the CPU.
    """

    ids: Sequence[Sequence[int]]
    logprobs: Sequence[Tensor]


@torch.no_grad()
def distributions(forward: Forward, ids: Sequence[Sequence[int]]) -> Distributions:
    """Computes a live model's next-token distributions at every position of texts.

    Args:
        forward: The model.
        ids: Token ids of each text, at least one.

    Returns:
        The distributions.

    Raises:
        CandidateError: There are more numbers than are held, or one is not finite.
    """
    count = sum(map(len, ids)) * forward.vocabulary
    if count > MAX_NUMBERS:
        raise CandidateError(
            f"the texts to be retained have {sum(map(len, ids)):,} tokens a step, which with a vocabulary of "
            f"{forward.vocabulary:,} are {count:,} numbers to be kept, more than {MAX_NUMBERS:,}; "
            "give fewer retain_items or shorter texts"
        )
    found: list[Tensor] = [torch.empty(0)] * len(ids)
    for batch in _batches(ids, forward.vocabulary):
        logits = _logits(forward, [ids[i] for i in batch])
        for i, own in zip(batch, logits, strict=True):
            found[i] = _logprobs(own).cpu()
    if not all(bool(torch.isfinite(logprobs).all()) for logprobs in found):
        raise CandidateError("the teacher's distributions on the texts to be retained are not finite")
    return Distributions(ids, found)


def backward(forward: Forward, teacher: Distributions, weights: Sequence[float]) -> list[float]:
    """Computes divergences, and adds the gradient of their weighted sum to the model's parameters.

    Args:
        forward: The model; its parameters that require a gradient get one.
        teacher: The distributions that it should have.
        weights: Of each text's divergence in the sum.

    Returns:
        Each text's divergence.
    """
    found = [0.0] * len(teacher.ids)
    with torch.enable_grad():
        for batch in _batches(teacher.ids, forward.vocabulary):
            total: Tensor | None = None
            for i, logits in zip(batch, _logits(forward, [teacher.ids[i] for i in batch]), strict=True):
                wanted = teacher.logprobs[i].to(logits.device)
                own = _logprobs(logits)
                divergence = (wanted.exp() * (wanted - own)).sum(-1).double().mean()
                found[i] = float(divergence.detach())
                part = weights[i] * divergence
                total = part if total is None else total + part
            if total is not None and total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
    return found


def _logprobs(logits: Tensor) -> Tensor:
    """Log-probabilities, in float32 of narrower logits."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _batches(ids: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[int]]:
    """Numbers of texts for one forward each, of similar lengths; always the same for the same texts."""
    most = max(1, min(_TOKENS, MAX_LOGITS // vocabulary))
    batch: list[int] = []
    for i in sorted(range(len(ids)), key=lambda i: (len(ids[i]), i)):
        if batch and (len(batch) + 1) * len(ids[i]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _logits(forward: Forward, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, vocabulary] of each text. Rows are padded at the end, which no earlier token sees."""
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), forward.pad_id, dtype=torch.long)
    rows: list[Tensor] = []
    for number, own in enumerate(ids):
        padded[number, : len(own)] = torch.tensor(own)
        rows.append(torch.arange(len(own)) + number * width)
    logits = forward(torch.cat(rows).to(forward.device), padded.to(forward.device), None)
    return list(torch.split(logits, [len(own) for own in ids]))
