"""A look at a routed model before it is scored in full: perplexity on a few tokens, so that a broken route costs little.

Most routes are broken: a stack in a random order scores near chance (arXiv 2403.13187, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

NATS_PER_TOKEN = "gate:nats"
"""The metric that a candidate kept out by the gate has: its nats a token."""
_BATCH = 1024  # tokens of one forward


@dataclass(frozen=True, slots=True)
class ScreenText:
    """ids: token ids of a text; first: the first of them that counts, at least 1."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class PerplexityScreen:
    """texts: what a candidate is looked at on; max_nats_per_token: nats a token above which it is not scored."""

    texts: tuple[ScreenText, ...]
    max_nats_per_token: float

    def rejection(self, nats: float) -> str | None:
        """Why a candidate is not scored; None if it is."""
        if nats <= self.max_nats_per_token:
            return None
        tokens = sum(len(row.ids) for row in self.texts)
        return f"gate: {nats:.2f} nats a token of the right answers in {tokens} tokens, more than {self.max_nats_per_token:.2f}; not scored"


def screen_texts(
    passages: Iterable[tuple[Sequence[int], Sequence[int]]], tokens: int, longest: int = 256
) -> tuple[ScreenText, ...]:
    """Rows of about `tokens` tokens in all. passages: token ids of a prompt, and of the prompt with its answer.

    Of a long text the last `longest` tokens are kept. The answer's tokens count, all where there is no answer.
    """
    found: list[ScreenText] = []
    for prompt, whole in passages:
        if tokens <= 0:
            break
        first = len(prompt) if len(prompt) < len(whole) else 1
        dropped = max(0, len(whole) - longest)
        if len(whole) > 1:
            found.append(ScreenText(tuple(whole[dropped:]), max(1, first - dropped)))
            tokens -= len(found[-1].ids)
    return tuple(found)


@torch.inference_mode()
def nats_per_token(model: nn.Module, rows: Sequence[ScreenText]) -> float:
    """Mean negative log-likelihood of the tokens that count, in nats; infinite where a logit is not finite.

    Rows of one length share a forward, so that nothing is padded.
    """
    device = next(model.parameters()).device
    groups: dict[int, list[ScreenText]] = {}
    for row in rows:
        groups.setdefault(len(row.ids), []).append(row)
    total, count = 0.0, 0
    for length, own in sorted(groups.items()):
        step = max(1, _BATCH // length)
        for batch in (own[start : start + step] for start in range(0, len(own), step)):
            ids = torch.tensor([row.ids for row in batch], device=device)
            counts = torch.arange(1, length, device=device) >= torch.tensor(
                [[row.first] for row in batch], device=device
            )
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            found = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
            total -= found.double()[counts].sum().item()
            count += int(counts.sum())
            if not math.isfinite(total) or not bool(torch.isfinite(logits.sum(dtype=torch.float64))):
                return math.inf
    return total / count if count else math.inf
