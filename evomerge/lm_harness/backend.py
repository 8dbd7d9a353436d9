"""What answers lm-eval's requests: the protocol, and lm-eval's own HFLM behind it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lm_eval.models.huggingface as hf
import torch
from torch import nn

from evomerge.lm_harness.encoding import Encoding
from evomerge.scoring.engine import Rounding
from evomerge.scoring.verdicts import Verdict

log = logging.getLogger(__name__)
_SEED = 1234  # lm-eval's own for torch
Answers = list[list[Any]]
"""Of each request its responses, one a repeat: (log-likelihood, greedy) pairs, log-likelihoods or texts."""


class Backend(Protocol):
    """Answers requests with one live model, whose weights change from candidate to candidate.

    `prepare` is called once for a set of requests, `answer` once a candidate. A served backend fits here too: a vLLM
    worker process that owns the engine. Its `prepare` tokenises and keeps the prompts; before `answer` the candidate's
    tensors are pushed into the serving process (its weight-update call over shared memory or NCCL, named as on disk, one
    layer at a time) and never reloaded from a folder; prefix caches are reset with each push, since their keys hold no
    weights; `answer` then sends token ids and takes back log-probabilities of prompt tokens and generated ids.
    """

    def prepare(self, requests: Sequence[Any]) -> Any:
        """What can be done once: tokens, plans, tensors."""
        ...

    def answer(self, prepared: Any, rounding: Rounding) -> Answers:
        """The responses of every prepared request, in order."""
        ...

    def tokens(self, request: Any) -> int:
        """How many tokens of a log-likelihood request are scored."""
        ...

    def techniques(self) -> Mapping[str, Verdict]:
        """Technique -> whether it is used with this model, and why; none where there are none to choose from."""
        ...

    def close(self) -> None:
        """Lets go of the model."""
        ...

    def handed(self, task: str) -> str | None:
        """Why a task's requests went through lm-eval's own path; None if none did."""
        ...


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


class LmEvalBackend:
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

    def techniques(self) -> Mapping[str, Verdict]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def handed(self, task: str) -> str | None:
        """It was asked for."""
        return "asked for by the configuration"
