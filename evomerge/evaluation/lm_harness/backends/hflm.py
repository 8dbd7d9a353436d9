"""lm-eval's own HFLM on the live model: as a backend, and for what the compiled backend does not take."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models.huggingface as hf
import torch
from torch import nn

from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.target_logprobs import Rounding
from evomerge.evaluation.lm_harness.backends.base import Answers
from evomerge.evaluation.lm_harness.tokenization import RequestTokenizer

log = logging.getLogger(__name__)
_SEED = 1234  # lm-eval's own for torch


def make_hflm(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """Wraps a live model in lm-eval's own class.

    Args:
        model: The live model.
        tokenizer: Its tokenizer.
        batch_size: HFLM's batch size.

    Returns:
        An `HFLM`.
    """
    return hf.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


def answer_by_hflm(lm: Any, requests: Sequence[Any], rounding: Rounding) -> Answers:
    """Answers requests as lm-eval does.

    Sampling starts from the same seed at every call; torch's generator is restored.

    Args:
        lm: An `HFLM`.
        requests: lm-eval's `Instance` objects.
        rounding: 'model' for lm-eval's rounding, 'float32' for log-softmax in float32.

    Returns:
        The responses of every request, in order.
    """
    answers: Answers = [[] for _ in requests]
    by_type: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        by_type[request.request_type] += [number] * (request.repeats or 1)
    lm.softmax_dtype = torch.float32 if rounding == "float32" else None
    devices = [lm.device.index or 0] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        for request_type, numbers in by_type.items():
            method = getattr(lm, request_type)  # lm-eval names its methods after types of requests
            responses = method([requests[n] for n in numbers], disable_tqdm=True)
            for number, response in zip(numbers, responses, strict=True):
                answers[number].append(response)
    return answers


class HFLMBackend:
    """Passes every request to lm-eval's own HFLM.

    Satisfies `evomerge.evaluation.lm_harness.backends.base.Backend`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        """See `BackendFactory`."""
        self.lm = make_hflm(model, tokenizer, batch_size)
        self._tokenize = RequestTokenizer(self.lm)

    def tokens(self, request: Any) -> int:
        """See `Backend.tokens`."""
        return self._tokenize.tokens(request)

    def prepare(self, requests: Sequence[Any]) -> list[Any]:
        """See `Backend.prepare`. The requests stay as they are."""
        return list(requests)

    def answer(self, prepared: Sequence[Any], rounding: Rounding) -> Answers:
        """See `Backend.answer`."""
        return answer_by_hflm(self.lm, prepared, rounding)

    def optimizations(self) -> Mapping[str, Verification]:
        """See `Backend.optimizations`. None."""
        return {}

    def close(self) -> None:
        """See `Backend.close`. There are no hooks."""

    def fallback_reason(self, task: str) -> str | None:
        """See `Backend.fallback_reason`."""
        return "asked for by the configuration"
