"""lm-eval's own HFLM on the live model: for what the compiled scorer does not take."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models.huggingface as hf
import torch
from torch import nn

from evomerge.evaluation.inference.loglikelihood import Rounding
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.lm_harness.backends.base import Answers
from evomerge.evaluation.lm_harness.tokenization import Encoding

log = logging.getLogger(__name__)
_SEED = 1234  # lm-eval's own for torch


def hflm(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's model over a live one."""
    return hf.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


def ask(lm: Any, requests: Sequence[Any], rounding: Rounding) -> Answers:
    """lm-eval's own answers. Sampling starts from the same seed at every call, and leaves torch's generator as it was."""
    answers: Answers = [[] for _ in requests]
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        kinds[request.request_type] += [number] * (request.repeats or 1)
    lm.softmax_dtype = torch.float32 if rounding == "float32" else None
    devices = [lm.device.index or 0] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        for kind, numbers in kinds.items():
            found = getattr(lm, kind)([requests[n] for n in numbers], disable_tqdm=True)
            for number, answer in zip(numbers, found, strict=True):
                answers[number].append(answer)
    return answers


class HFLMBackend:
    """lm-eval's own path for everything. Satisfies `Backend`."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        self.lm = hflm(model, tokenizer, batch_size)
        self._encoding = Encoding(self.lm)

    def tokens(self, request: Any) -> int:
        """How many tokens of a log-likelihood request are scored."""
        return self._encoding.tokens(request)

    def prepare(self, requests: Sequence[Any]) -> list[Any]:
        """The requests themselves."""
        return list(requests)

    def answer(self, prepared: Sequence[Any], rounding: Rounding) -> Answers:
        """HFLM's answers."""
        return ask(self.lm, prepared, rounding)

    def optimizations(self) -> Mapping[str, Verification]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def fallback_reason(self, task: str) -> str | None:
        """It was asked for."""
        return "asked for by the configuration"
