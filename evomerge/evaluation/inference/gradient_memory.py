"""How much memory the graphs of a plan take, and the fastest way to its gradient within a bound.

The bound and the sizes are facts of the model and the plan, never of the memory that is free: which way is
taken moves the last digits of a gradient, and a search has the same rows on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.errors import RouteError
from evomerge.evaluation.inference.attention_gradients import half_precision_attention
from evomerge.evaluation.inference.loglikelihood_plan import LoglikelihoodPlan
from evomerge.merging.routing.decoder_layers import stack

if TYPE_CHECKING:
    from evomerge.evaluation.inference.forward import Forward

_FLOOR, _SHARE = 1 << 28, 2
"""Graphs may take 256 MiB and half of the size of the weights, so that a peak stays near that of scoring."""
_PROBES = (32, 96)  # tokens of the forwards that are measured


@dataclass(frozen=True, slots=True)
class Way:
    """How the gradient of a plan is computed. Every way gives the same, but for the order of sums.

    Attributes:
        passes: 1: the graphs of all steps are kept; 2: a pass without graphs comes first, then one is kept at
            a time.
        recomputes: Whether decoder layers keep their inputs alone and run again in the backward pass.
    """

    passes: int = 1
    recomputes: bool = False


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """What the graph of a forward keeps, in bytes.

    Attributes:
        token: For each token.
        pair: For each pair of a token and one that it may attend to.
        row: For each row of logits.
        input: For each token where layers are recomputed: what enters each of them, keys and values.
        layers: Number of layers; 0 where they cannot be told apart, so that none is run again.
        bound: That graphs may take.
    """

    token: float
    pair: float
    row: float
    input: float
    layers: int
    bound: int


def measure(forward: Forward) -> GraphSizes:
    """Measures the graph of a model whose parameters require gradients, on two short forwards.

    Args:
        forward: Of the model.

    Returns:
        Sizes, from what autograd saves.
    """
    short, long = (_saved_bytes(forward, tokens) for tokens in _PROBES)
    a, b = _PROBES
    pair = max(0.0, (long / b - short / a) / (b - a))
    token = max(short / a - pair * a, 0.0)
    config: Any = forward.model.config
    config = config.get_text_config(decoder=True)
    try:
        layers = len(stack(forward.model)[1])
    except RouteError:
        layers = 0
    item = torch.empty(0, dtype=forward.dtype).element_size()
    weights = sum(p.numel() * p.element_size() for p in forward.model.parameters())
    return GraphSizes(
        token=token,
        pair=pair,
        row=float(forward.vocabulary * item),
        input=3.0 * layers * config.hidden_size * item,
        layers=layers,
        bound=_FLOOR + weights // _SHARE,
    )


def choose_way(plan: LoglikelihoodPlan, sizes: GraphSizes) -> Way:
    """Chooses the fastest way to a plan's gradient whose graphs fit.

    Args:
        plan: The plan.
        sizes: Of the model's graphs.

    Returns:
        The way; where nothing fits, the one that takes least.
    """
    whole, light = _step_bytes(plan, sizes, recomputes=False), _step_bytes(plan, sizes, recomputes=True)
    if sum(whole) <= sizes.bound:
        return Way(1)
    if sizes.layers and sum(light) + max(whole) / sizes.layers <= sizes.bound:
        return Way(1, recomputes=True)
    kept = sum(size for size, step in zip(whole, plan.steps, strict=True) if step.keep is not None)
    return Way(2, recomputes=sizes.layers > 0 and kept + max(whole) > sizes.bound)


def _step_bytes(plan: LoglikelihoodPlan, sizes: GraphSizes, *, recomputes: bool) -> Sequence[float]:
    """Bytes of the graph of each step."""
    lengths: dict[int, int] = {}  # of caches
    found = []
    for step in plan.steps:
        rows, columns = step.ids.shape
        length = columns + (0 if step.source is None else lengths[step.source])
        if step.keep is not None:
            lengths[step.keep] = length
        logits = sizes.row * (0 if step.reads is None else step.reads.rows.numel())
        tokens = rows * columns
        inside = sizes.input if recomputes else sizes.token + sizes.pair * length
        found.append(tokens * inside + logits)
    return found


def _saved_bytes(forward: Forward, tokens: int) -> float:
    """Bytes of the storages that autograd saves in one forward, but for parameters."""
    known = {p.untyped_storage().data_ptr() for p in forward.model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    ids = torch.full((1, tokens), forward.pad_id, device=forward.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), half_precision_attention(), hooks:
        forward(forward.first, ids, None)
    return float(sum(sizes.values()))
