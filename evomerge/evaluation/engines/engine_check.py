"""Whether an engine computes what the live model computes.

Its texts are scored again by plain forwards of the live model: the regret of each token, and how far its
log-probability is from the model's. The same is done after all weights were changed, and the first texts have
to come back, bit for bit, when the weights are what they were: then pushes reach every tensor, and nothing of
earlier weights is left in the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from evomerge.evaluation.engines.texts import Text
from evomerge.evaluation.inference.generation_probe import regrets
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import RowHead, dtype_of

_FLOAT32_REGRET, _FLOAT32_DIFFERENCE = 1e-3, 1e-3  # logits, and nats relative to the largest logit
_HALF_REGRET = 0.06  # logits; see `generation_probe`
_EPSILONS = 4.0  # rounding steps of the largest logit: two programs round apart
_HALF_ABSOLUTE, _HALF_RELATIVE = 0.15, 0.05


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an engine's texts are from a model.

    Attributes:
        regret: Largest logit at a token's place less that of the token, the largest of all tokens.
        difference: Largest difference of two log-probabilities, in nats.
        largest: Size of the largest logit.
    """

    regret: float
    difference: float
    largest: float

    def is_right(self, dtype: torch.dtype) -> bool:
        """Whether that is rounding. NaN is not.

        Args:
            dtype: Type of the weights.

        Returns:
            True where it is.
        """
        if dtype in (torch.float32, torch.float64):
            most = _FLOAT32_DIFFERENCE * max(1.0, self.largest)
            return self.regret <= _FLOAT32_REGRET * max(1.0, self.largest) and self.difference <= most
        rounding = _EPSILONS * torch.finfo(dtype).eps * self.largest
        near = max(_HALF_ABSOLUTE, _HALF_RELATIVE * self.largest)
        return self.regret <= max(_HALF_REGRET, rounding) and self.difference <= near

    def __str__(self) -> str:
        return f"regret {self.regret:.1e}, log-probabilities differ by {self.difference:.1e}"


def compare(head: RowHead, prompts: Sequence[Sequence[int]], texts: Sequence[Text]) -> Agreement:
    """Scores an engine's texts by plain forwards.

    Args:
        head: The live model's.
        prompts: Token ids.
        texts: What the engine generated after each, at least one token.

    Returns:
        How far they are from the model.
    """
    regret, logits = regrets(head, prompts, [text.tokens for text in texts])
    difference = largest = 0.0
    for text, rows in zip(texts, logits, strict=True):
        tokens = torch.tensor(text.tokens, device=rows.device)
        own = torch.log_softmax(rows.float(), -1).gather(1, tokens[:, None])[:, 0].cpu()
        apart = (own - torch.tensor(text.logprobs)).abs().max()
        difference = max(difference, float(apart)) if apart == apart else float("nan")
        largest = max(largest, float(rows.abs().max()))
    return Agreement(regret, difference, largest)


def check(
    model: nn.Module, head: RowHead, prompts: Sequence[Sequence[int]], texts: Callable[[], list[Text]]
) -> Verification:
    """Compares an engine with the live model: as it is, with other weights, and as it was.

    Args:
        model: The live model; its weights are changed and restored exactly.
        head: Its `RowHead`.
        prompts: Token ids of a few prompts.
        texts: Gives the engine the live model's weights and generates after the prompts.

    Returns:
        Whether it can be trusted, and what was measured.
    """
    dtype = dtype_of(model)
    first = texts()
    before = compare(head, prompts, first)
    if not before.is_right(dtype):
        return Verification(False, f"its texts are not the model's: {before}")
    with _other_weights(model):
        other = texts()
        after = compare(head, prompts, other)
    if not after.is_right(dtype):
        return Verification(False, f"its texts are not the model's after a push of other weights: {after}")
    if [(t.tokens, t.logprobs) for t in texts()] != [(t.tokens, t.logprobs) for t in first]:
        return Verification(False, "it does not give the first texts again after a push of the first weights")
    return Verification(True, f"{before}; with other weights {after}; restored bit for bit")


@contextmanager
def _other_weights(model: nn.Module) -> Iterator[None]:
    """Every tensor is doubled or negated, which is exact to undo in any type of numbers."""
    tensors = [parameter.data for parameter in model.parameters()]
    with torch.no_grad():
        _scale(tensors, 2.0)
        try:
            yield
        finally:
            _scale(tensors, 0.5)


def _scale(tensors: Sequence[torch.Tensor], factor: float) -> None:
    for number, tensor in enumerate(tensors):
        tensor.mul_(factor if number % 2 else -1.0)
