"""Log-likelihoods of continuations on a live model.

Runs plans, and gives the numbers of one request at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.budgets import Budgets, budgets_of
from evomerge.evaluation.inference import gradient_memory, kv_cache, loglikelihood_gradients
from evomerge.evaluation.inference.cuda_graphs import Step, graphs_for
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.gradient_memory import GraphSizes, Way
from evomerge.evaluation.inference.loglikelihood_gradients import SlopesOf
from evomerge.evaluation.inference.loglikelihood_plan import (
    OPTIMIZATIONS,
    ForwardStep,
    LoglikelihoodPlan,
    ModelFacts,
    Optimization,
    make_plan,
)
from evomerge.evaluation.inference.plan_replay import PlanReplay, Program
from evomerge.evaluation.inference.request_sums import RequestSums
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.evaluation.inference.target_logprobs import Rounding, target_logprobs

# parameters x tokens of a forward above which a card takes a tenth of a second, and its Python no part of it
_LONG_FORWARD = 4e13


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of n requests.

    Attributes:
        sums: [n] of float64, log-likelihood of each continuation in nats.
        greedy: [n] of bool, whether each token of the continuation is the likeliest.
    """

    sums: Tensor
    greedy: Tensor


@dataclass(slots=True)
class _Totals:
    """What a run of a plan adds up.

    terms: of log-likelihoods; sums, mismatches: [n] of each distinct request, its log-likelihood and how many
    of its tokens are not the likeliest; dtype: of the logits.
    """

    terms: RequestSums
    sums: Tensor
    mismatches: Tensor
    dtype: torch.dtype = torch.float32

    def clear(self) -> None:
        self.terms.clear()
        self.mismatches.zero_()

    def add_up(self) -> None:
        """Fills the sums."""
        self.sums.copy_(self.terms.total())

    def round(self) -> None:
        """Rounds the sums to the logits' type."""
        self.sums.copy_(self.sums.to(self.dtype))


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
        budgets: Budgets | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: The live model.
            pad_id: Token id that rows are padded with.
            tokens: Most input tokens of one forward; None for the budget.
            forward_cost: What one more forward costs, in tokens; None for the default.
            verifications: Result of `loglikelihood_probe.probe`. Without it only plain rows are used unless
                an optimization is named.
            budgets: Limits of a forward; None for the device's.
        """
        self.model, self.head, self.verifications = model, RowHead(model), verifications or {}
        self.forward = forward = Forward(model, self.head, pad_id)
        budgets = budgets or budgets_of(forward.device)
        self.facts = ModelFacts(
            dtype=forward.dtype,
            device=forward.device,
            windows=forward.limits,
            positions=forward.takes_positions,
            pad_id=pad_id,
            tokens=tokens or budgets.tokens,
            rows=max(64, budgets.logits // forward.vocabulary),
        )
        self._sizes: GraphSizes | None = None
        if forward_cost is not None:
            self.facts = replace(self.facts, forward_cost=forward_cost)
        self._weights = sum(p.numel() for p in model.parameters())
        self.graphs = graphs_for(model)
        self.replay = None if self.graphs is None else PlanReplay(model, self.graphs)

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
        sums, mismatches = self._run(plan, rounding)
        places = plan.places.to(self.facts.device)
        return Scores(sums[places].cpu(), (mismatches == 0)[places].cpu())

    @torch.inference_mode()
    def sums(self, plan: LoglikelihoodPlan) -> Tensor:
        """Scores the distinct requests of a plan.

        Args:
            plan: Result of `compile`.

        Returns:
            [n] of float64, log-likelihood of each distinct request, see `LoglikelihoodPlan.places`.
        """
        return self._run(plan, "float32")[0]

    def _run(self, plan: LoglikelihoodPlan, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Of each distinct request, its log-likelihood and how many of its tokens are not the likeliest."""
        if self.replay is None or not self._is_short(plan):
            sums, mismatches = self._program(plan, rounding).run()
        else:
            make = functools.partial(self._program, plan, rounding)
            try:
                sums, mismatches = self.replay.run(plan, rounding, make)
            except torch.OutOfMemoryError:
                self.replay.clear()  # whoever tries again with less has what the graphs held
                raise
        return sums, mismatches

    @property
    def _captures(self) -> bool:
        return self.replay is not None and self.forward.argument is not None

    def _is_short(self, plan: LoglikelihoodPlan) -> bool:
        """Whether Python takes a part of a forward's time that a replay can save."""
        return self._weights * plan.tokens <= _LONG_FORWARD * max(1, len(plan.steps))

    def _program(self, plan: LoglikelihoodPlan, rounding: Rounding) -> Program:
        """The steps of a plan over totals of their own."""
        device = self.facts.device
        totals = _Totals(
            RequestSums(plan.size, device),
            torch.zeros(plan.size, dtype=torch.float64, device=device),
            torch.zeros(plan.size, dtype=torch.long, device=device),
        )
        caches: dict[int, Any] = {}
        steps: list[Step] = [totals.clear]
        steps += [functools.partial(self._add, step, caches, totals, rounding) for step in plan.steps]
        steps.append(totals.add_up)
        if rounding == "model":
            steps.append(totals.round)
        return Program((totals.sums, totals.mismatches), steps)

    def _add(self, step: ForwardStep, caches: dict[int, Any], totals: _Totals, rounding: Rounding) -> None:
        """Runs a step of a plan and adds what it reads to the totals."""
        logits = self.forward_step(step, caches)
        if step.reads is not None:
            totals.dtype = logits.dtype
            logprobs, likeliest = target_logprobs(logits, step.reads, rounding)
            totals.terms.add(step.reads.request, logprobs)
            wrong = (likeliest != step.reads.target).long()
            totals.mismatches.index_add_(0, step.reads.request, wrong)
        for number in step.drop:
            del caches[number]

    def differentiate(self, plan: LoglikelihoodPlan, slopes_of: SlopesOf, way: Way | None = None) -> None:
        """Adds the gradient of a loss of log-likelihoods to the parameters that require one.

        Args:
            plan: Result of `compile`, of whose caches every layer holds keys and values alone.
            slopes_of: Derivatives of the loss by the log-likelihoods of distinct requests, given these; see
                `LoglikelihoodPlan.places`.
            way: How it is computed; None for the fastest way whose memory is bounded.

        Raises:
            CandidateError: A cache holds recurrent states, which cannot be cut; use the optimization 'plain'.
        """
        if way is None:
            if self._sizes is None:
                self._sizes = gradient_memory.measure(self.forward)
            way = gradient_memory.choose_way(plan, self._sizes)
        loglikelihood_gradients.differentiate(self, plan, slopes_of, way)

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

    def forward_step(self, step: ForwardStep, caches: dict[int, Any]) -> Tensor:
        """Runs one step of a plan.

        Args:
            step: The step.
            caches: Number -> cache of the steps before; the step's own is added where it is kept.

        Returns:
            [N, V] logits of the rows that the step reads; of its first row where it reads none.
        """
        past = None
        if step.source is not None:
            past = kv_cache.fork(caches[step.source], rows=step.spread, index=step.index)
        elif step.keep is not None:
            past = kv_cache.new_cache(self.model, windowed=step.windowed)
        elif self._captures and not torch.is_grad_enabled():
            # transformers makes another mask while it is captured, but not on top of a cache
            past = kv_cache.new_cache(self.model, windowed=False)
        rows = step.reads.rows if step.reads is not None else self.forward.first
        logits = self.forward(rows, step.ids, past, positions=step.positions, mask=step.mask)
        if step.keep is not None:
            caches[step.keep] = past
        return logits
