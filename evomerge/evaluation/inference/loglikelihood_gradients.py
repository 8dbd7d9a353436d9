"""Gradients of log-likelihoods, step by step of a plan, within a bound on memory.

What each request weighs in the loss follows from the log-likelihoods of others (choices compete), so that it
is known after a pass over the whole plan. Where the graphs of that pass fit into the bound, they are kept and
run backward: one forward pass, one backward. Else a pass without graphs comes first, and each step is run
again with a graph whose backward pass follows at once. The graph is cut at each cache that later steps
continue: its keys and values become leaves, and the backward pass of a shared prefix comes when all that read
it have run theirs, so that no step holds the partial gradients of another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.attention_gradients import half_precision_attention
from evomerge.evaluation.inference.gradient_memory import Way
from evomerge.evaluation.inference.layer_recomputation import recomputed_layers
from evomerge.evaluation.inference.loglikelihood_plan import ForwardStep, LoglikelihoodPlan
from evomerge.evaluation.inference.request_sums import RequestSums
from evomerge.evaluation.inference.target_logprobs import differentiable_logprobs

if TYPE_CHECKING:
    from evomerge.evaluation.inference.loglikelihood import Engine

SlopesOf = Callable[[Tensor], Tensor]
"""Log-likelihood of each distinct request -> its weight in the loss, both [n] of float64."""


@dataclass(slots=True)
class _Computed:
    """A step with its graph.

    logprobs: of the tokens that it reads; pairs: (tensor of its cache, leaf that later steps read).
    """

    step: ForwardStep
    logprobs: Tensor | None
    pairs: list[tuple[Tensor, Tensor]]

    def backward(self, slopes: Tensor) -> None:
        """Runs the step's backward pass, once all that read its cache have run theirs."""
        known = [(own, leaf.grad) for own, leaf in self.pairs if leaf.grad is not None and own.requires_grad]
        tensors: list[Tensor] = [own for own, _ in known]
        gradients: list[Tensor] = [gradient for _, gradient in known if gradient is not None]
        if self.logprobs is not None and self.step.reads is not None:
            tensors.append(self.logprobs)
            gradients.append(slopes[self.step.reads.request].to(self.logprobs.dtype))
        if tensors:
            torch.autograd.backward(tensors, gradients)


def differentiate(engine: Engine, plan: LoglikelihoodPlan, slopes_of: SlopesOf, way: Way) -> None:
    """Adds the gradient of a loss of log-likelihoods to the parameters that require one.

    Args:
        engine: Of the live model.
        plan: Result of `Engine.compile`, of whose caches every layer holds keys and values alone.
        slopes_of: Derivatives of the loss by the requests' log-likelihoods, given these.
        way: How it is computed.

    Raises:
        CandidateError: A cache holds recurrent states, which cannot be cut; use the optimization 'plain'.
    """
    layers = recomputed_layers(engine.model) if way.recomputes else nullcontext()
    with layers, half_precision_attention():
        if way.passes == 1:
            _by_plan(engine, plan, slopes_of)
        else:
            slopes = slopes_of(engine.sums(plan).cpu())
            _by_step(engine, plan, slopes.to(engine.facts.device))


def _by_plan(engine: Engine, plan: LoglikelihoodPlan, slopes_of: SlopesOf) -> None:
    """Computes all steps, then runs them backward."""
    computed: list[_Computed] = []
    sums = RequestSums(plan.size, engine.facts.device)
    caches: dict[int, Any] = {}
    for step in plan.steps:
        computed.append(_compute(engine, step, caches))
        logprobs = computed[-1].logprobs
        if logprobs is not None and step.reads is not None:
            sums.add(step.reads.request, logprobs.detach())
        for number in step.drop:
            del caches[number]
    slopes = slopes_of(sums.total().cpu()).to(engine.facts.device)
    while computed:  # what reads a cache comes after the step that made it
        computed.pop().backward(slopes)


def _by_step(engine: Engine, plan: LoglikelihoodPlan, slopes: Tensor) -> None:
    """Computes each step and runs it backward at once, one that is continued after all that continue it."""
    caches: dict[int, Any] = {}
    waiting: dict[int, _Computed] = {}
    is_read: set[int] = set()
    for step in plan.steps:
        computed = _compute(engine, step, caches)
        if step.keep is None:
            computed.backward(slopes)
        else:
            waiting[step.keep] = computed
        for number in step.drop:
            del caches[number]
            is_read.add(number)
        for number in sorted(waiting, reverse=True):
            is_continued = any(other.step.source == number for other in waiting.values())
            if number in is_read and not is_continued:
                waiting.pop(number).backward(slopes)


def _compute(engine: Engine, step: ForwardStep, caches: dict[int, Any]) -> _Computed:
    """Runs a step with a graph."""
    with torch.enable_grad():
        logits = engine.forward_step(step, caches)
        logprobs = None if step.reads is None else differentiable_logprobs(logits, step.reads)
    pairs: list[tuple[Tensor, Tensor]] = []
    if step.keep is not None:
        whole = caches[step.keep]
        caches[step.keep] = kv_cache.detached(whole)
        pairs = kv_cache.key_value_pairs(whole, caches[step.keep])
    return _Computed(step, logprobs, pairs)
