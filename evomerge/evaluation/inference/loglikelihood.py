"""Log-likelihoods of continuations on a live model.

Runs plans, and gives the numbers of one request at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.forward import MAX_LOGITS, Forward
from evomerge.evaluation.inference.loglikelihood_plan import (
    OPTIMIZATIONS,
    ForwardStep,
    LoglikelihoodPlan,
    ModelFacts,
    Optimization,
    Reads,
    make_plan,
)
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.inference.selected_logits import RowHead

Rounding = Literal["float32", "model"]
"""How log-probabilities are rounded; see `Engine.run`."""
_PIECE = 512  # rows whose float32 logits are held at once
_TOKENS_CPU, _TOKENS_ACCELERATOR = 1024, 16384  # inputs of one forward; on a CPU more is no faster


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of n requests.

    Attributes:
        sums: [n] of float64, log-likelihood of each continuation in nats.
        greedy: [n] of bool, whether each token of the continuation is the likeliest.
    """

    sums: Tensor
    greedy: Tensor


class Engine:
    """Scores requests on one model, whose weights may change between two runs of a plan.

    A context manager: leaving it removes its hook from the model.

        with Engine(model, verifications=probe(model)) as engine:
            plan = engine.compile(requests)
            scores = engine.run(plan)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int = 0,
        tokens: int | None = None,
        forward_cost: int | None = None,
        verifications: Mapping[str, Verification] | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: The live model.
            pad_id: Token id that rows are padded with.
            tokens: Most input tokens of one forward; None for 1,024 on a CPU, where more is no faster, else
                16,384.
            forward_cost: What one more forward costs, in tokens; None for the default.
            verifications: Result of `loglikelihood_probe.probe`. Without it only plain rows are used unless
                an optimization is named.
        """
        self.model, self.head, self.verifications = model, RowHead(model), verifications or {}
        self.forward = forward = Forward(model, self.head, pad_id)
        self.facts = ModelFacts(
            dtype=forward.dtype,
            device=forward.device,
            windows=forward.limits,
            positions=forward.takes_positions,
            pad_id=pad_id,
            tokens=tokens or (_TOKENS_CPU if forward.device.type == "cpu" else _TOKENS_ACCELERATOR),
            rows=max(64, MAX_LOGITS // forward.vocabulary),
        )
        if forward_cost is not None:
            self.facts = replace(self.facts, forward_cost=forward_cost)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.head.close()

    @property
    def best(self) -> Optimization:
        """The allowed optimization that shares most; 'plain' if none is allowed."""
        for optimization in OPTIMIZATIONS:
            verification = self.verifications.get(optimization)
            if verification is not None and verification.allowed:
                return optimization
        return "plain"

    def compile(
        self, requests: Sequence[Request], optimization: Optimization | None = None
    ) -> LoglikelihoodPlan:
        """Plans the forwards that score requests.

        Args:
            requests: The requests.
            optimization: How to share computation; None for the best that is allowed.

        Returns:
            A plan that can be run any number of times.
        """
        return make_plan(requests, optimization or self.best, self.facts)

    @torch.inference_mode()
    def run(self, plan: LoglikelihoodPlan, rounding: Rounding = "float32") -> Scores:
        """Scores the requests of a plan. Raises whatever the model raises.

        Args:
            plan: Result of `compile`.
            rounding: 'float32' sums log-probabilities of the model's logits in full; 'model' rounds each of
                them and their sum to the logits' type, as lm-eval's HFLM does by default.

        Returns:
            Scores in the order of the requests.
        """
        device = self.facts.device
        sums = torch.zeros(plan.size, dtype=torch.float64, device=device)
        mismatches = torch.zeros(plan.size, dtype=torch.long, device=device)
        caches: dict[int, Any] = {}
        dtype = torch.float32
        for step in plan.steps:
            logits = self._forward(step, caches)
            if step.reads is not None:
                dtype = logits.dtype
                logprobs, likeliest = _target_logprobs(logits, step.reads, rounding)
                sums.index_add_(0, step.reads.request, logprobs.double())
                mismatches.index_add_(0, step.reads.request, (likeliest != step.reads.target).long())
            for number in step.drop:
                del caches[number]
        if rounding == "model":
            sums = sums.to(dtype).double()
        places = plan.places.to(device)
        return Scores(sums[places].cpu(), (mismatches == 0)[places].cpu())

    def backward(self, plan: LoglikelihoodPlan, slopes: Tensor) -> None:
        """Adds the gradient of a weighted sum of log-likelihoods to the parameters that require one.

        The graph is cut at each cache that later steps continue: its keys and values become leaves, the
        backward pass of a step runs at once, and that of a shared prefix when the last step that reads it is
        done. So no step holds the partial gradients of another, and a hook of a parameter that takes its
        gradient and frees it sees each step by itself.

        Args:
            plan: Result of `compile`, of whose caches every layer holds keys and values alone.
            slopes: [n] of float64, the weight of each distinct request, see `LoglikelihoodPlan.places`.

        Raises:
            CandidateError: A cache holds recurrent states, which cannot be cut; use the optimization 'plain'.
        """
        slopes = slopes.to(self.facts.device)
        caches: dict[int, Any] = {}
        prefixes: dict[int, _Prefix] = {}
        with torch.enable_grad():
            for step in plan.steps:
                logits = self._forward(step, caches)
                part = None
                if step.reads is not None:
                    logprobs, _ = _target_logprobs(logits, step.reads, "float32")
                    part = (slopes[step.reads.request] * logprobs.double()).sum()
                if step.keep is None:
                    if part is not None:
                        part.backward()  # type: ignore[no-untyped-call]
                else:
                    whole = caches[step.keep]
                    caches[step.keep] = kv_cache.detached(whole)
                    prefixes[step.keep] = _Prefix(whole, caches[step.keep], part, step.source)
                for number in step.drop:
                    del caches[number]
                    prefixes[number].is_read = True
                _run_backward(prefixes)

    def score(
        self,
        requests: Sequence[Request],
        optimization: Optimization | None = None,
        rounding: Rounding = "float32",
    ) -> Scores:
        """Plans and scores requests at once.

        Args:
            requests: The requests.
            optimization: As in `compile`.
            rounding: As in `run`.

        Returns:
            Scores in the order of the requests.
        """
        return self.run(self.compile(requests, optimization), rounding)

    def _forward(self, step: ForwardStep, caches: dict[int, Any]) -> Tensor:
        """Logits [N, V] of the rows that a step reads; of its first row where it reads none."""
        past = None
        if step.source is not None:
            past = kv_cache.fork(caches[step.source], rows=step.spread, index=step.index)
        elif step.keep is not None:
            past = kv_cache.new_cache(self.model, windowed=step.windowed)
        rows = step.reads.rows if step.reads is not None else self.forward.first
        logits = self.forward(rows, step.ids, past, positions=step.positions, mask=step.mask)
        if step.keep is not None:
            caches[step.keep] = past
        return logits


@dataclass(slots=True)
class _Prefix:
    """A step whose cache others continue, until its backward pass.

    whole: the cache with its graph; leaves: what others read; part: the step's own sum; source: number of the
    cache that it continues itself; is_read: whether all that continue it have been computed.
    """

    whole: Any
    leaves: Any
    part: Tensor | None
    source: int | None
    is_read: bool = False

    def backward(self) -> None:
        """Runs the step's backward pass, once all that read its cache have run theirs."""
        pairs = kv_cache.key_value_pairs(self.whole, self.leaves)
        known = [(own, leaf.grad) for own, leaf in pairs if leaf.grad is not None and own.requires_grad]
        tensors, gradients = [own for own, _ in known], [gradient for _, gradient in known]
        if self.part is not None:
            tensors.append(self.part)
            gradients.append(torch.ones_like(self.part))
        if tensors:
            torch.autograd.backward(tensors, gradients)


def _run_backward(prefixes: dict[int, _Prefix]) -> None:
    """Runs and removes the steps that nothing reads any more, those that continue another one before it."""
    for number in sorted(prefixes, reverse=True):
        waits = any(other.source == number for other in prefixes.values())
        if prefixes[number].is_read and not waits:
            prefixes.pop(number).backward()


def _target_logprobs(logits: Tensor, reads: Reads, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, likeliest token at its row), both [M]."""
    pieces = torch.split(logits, _PIECE)
    if rounding == "model":
        rounded = torch.cat([torch.log_softmax(piece, -1) for piece in pieces])
        likeliest = rounded.argmax(-1)  # rounding makes ties, and the first of them wins
        return rounded[reads.row, reads.target], likeliest[reads.row]
    normalizers = torch.cat([torch.logsumexp(piece.float(), -1) for piece in pieces])
    logprobs = logits[reads.row, reads.target].float() - normalizers[reads.row]
    return logprobs, logits.argmax(-1)[reads.row]
