"""Early rejection of routed models by perplexity on a few tokens, so that a broken route costs little.

Most routes are broken: a stack of layers in a random order scores near chance (arXiv:2403.13187, section
3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

NATS_PER_TOKEN = "gate:nats"
"""Name of the one metric that a rejected candidate has, as it is stored: its nats per token."""
_BATCH = 1024  # most tokens of one forward


@dataclass(frozen=True, slots=True)
class ScreenText:
    """A text that candidates are screened on.

    Attributes:
        ids: Token ids, at least two.
        first: Index of the first token whose likelihood counts, at least 1.
    """

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class PerplexityScreen:
    """The rule by which routed models are rejected.

    Attributes:
        texts: What a candidate is screened on.
        max_nats_per_token: Mean negative log-likelihood above which a candidate is not scored.
    """

    texts: tuple[ScreenText, ...]
    max_nats_per_token: float

    def rejection(self, nats_per_token: float) -> str | None:
        """Decides about a candidate.

        Args:
            nats_per_token: Its mean negative log-likelihood on `texts`.

        Returns:
            Why it is not scored; None if it is.
        """
        if nats_per_token <= self.max_nats_per_token:
            return None
        tokens = sum(len(text.ids) for text in self.texts)
        return (
            f"gate: {nats_per_token:.2f} nats a token of the right answers in {tokens} tokens, "
            f"more than {self.max_nats_per_token:.2f}; not scored"
        )


def screen_texts(
    examples: Iterable[tuple[Sequence[int], Sequence[int]]], tokens: int, longest: int = 256
) -> tuple[ScreenText, ...]:
    """Chooses texts to screen on.

    Args:
        examples: (token ids of a prompt, of the prompt with its answer) pairs. The answer's tokens count, all
            but the first of the text where there is no answer.
        tokens: About how many tokens are wanted in all.
        longest: Most tokens of one text; of a longer one the last are kept.

    Returns:
        The first examples that hold so many tokens.
    """
    texts: list[ScreenText] = []
    for prompt, whole in examples:
        if tokens <= 0:
            break
        first = len(prompt) if len(prompt) < len(whole) else 1
        dropped = max(0, len(whole) - longest)
        if len(whole) > 1:
            texts.append(ScreenText(tuple(whole[dropped:]), max(1, first - dropped)))
            tokens -= len(texts[-1].ids)
    return tuple(texts)


@torch.inference_mode()
def nats_per_token(model: nn.Module, texts: Sequence[ScreenText]) -> float:
    """Measures the perplexity of a model. Texts of one length share a forward, so that nothing is padded.

    Args:
        model: A transformers model.
        texts: Texts to measure it on.

    Returns:
        Mean negative log-likelihood of the tokens that count, in nats; infinite where a logit is not finite,
        and where no token counts.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in _batches(texts):
        length = len(batch[0].ids)
        ids = torch.tensor([text.ids for text in batch], device=device)
        first = torch.tensor([[text.first] for text in batch], device=device)
        counts = torch.arange(1, length, device=device) >= first
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        total -= logprobs.double()[counts].sum().item()
        count += int(counts.sum())
        if not math.isfinite(total) or not bool(torch.isfinite(logits.sum(dtype=torch.float64))):
            return math.inf
    return total / count if count else math.inf


def _batches(texts: Sequence[ScreenText]) -> Iterator[list[ScreenText]]:
    """Texts of one length each, the shortest first, of at most _BATCH tokens in all."""
    by_length: dict[int, list[ScreenText]] = {}
    for text in texts:
        by_length.setdefault(len(text.ids), []).append(text)
    for length, group in sorted(by_length.items()):
        size = max(1, _BATCH // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]
