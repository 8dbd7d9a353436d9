"""What answers lm-eval's requests: the protocol, and lm-eval's own HFLM behind it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from evomerge.evaluation.inference.loglikelihood import Rounding
from evomerge.evaluation.inference.requests import Verification

log = logging.getLogger(__name__)
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

    def optimizations(self) -> Mapping[str, Verification]:
        """Technique -> whether it is used with this model, and why; none where there are none to choose from."""
        ...

    def close(self) -> None:
        """Lets go of the model."""
        ...

    def fallback_reason(self, task: str) -> str | None:
        """Why a task's requests went through lm-eval's own path; None if none did."""
        ...
