"""Verifies which optimizations of scoring a model can be trusted with.

By numbers on random tokens, not by a list of names.

An optimization is allowed if its scores equal the plain rows' (equality), if a row's scores do not move when
its neighbours' tokens change (isolation), and if it really computed fewer tokens: one that fell back to plain
rows proves nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.forward import vocabulary
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import OPTIMIZATIONS, Optimization
from evomerge.evaluation.inference.requests import Request, Verification

_TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Nats per token that rounding alone may move a score by."""
_NOISE_FACTOR = 8.0  # tolerance over the spread of plain scores between batch compositions
_CONTEXT, _SHARED = 16, 24  # tokens of a context and of the prefix that contexts share
_CONTEXTS, _CONTINUATIONS = 3, 3


@dataclass(frozen=True, slots=True)
class _Trial:
    """What every optimization is tried on.

    requests: the requests; changed: the same with other tokens but in the requests `unchanged`; expected,
    lengths [n]: plain sums and tokens of each request; tolerance: in nats per token.
    """

    requests: Sequence[Request]
    changed: Sequence[Request]
    unchanged: Sequence[int]
    expected: Tensor
    lengths: Tensor
    tolerance: float


def probe(
    model: nn.Module, *, span: int = 0, max_length: int = 1 << 20, pad_id: int = 0, seed: int = 0
) -> dict[str, Verification]:
    """Verifies every optimization on a model.

    Args:
        model: The live model; its weights matter little.
        span: Length of the longest request that will come, so that windows have an effect.
        max_length: Number of the model's positions.
        pad_id: Token id that rows are padded with.
        seed: Of the random tokens.

    Returns:
        Optimization -> verification.
    """
    rnd = random.Random(seed)
    shared = max(16, min(max(_SHARED, span - _CONTEXT), max_length - 2 * _CONTEXT - 8))
    requests, changed = _requests(model, rnd, shared)
    lengths = torch.tensor([len(request.continuation) for request in requests])
    with Engine(model, pad_id=pad_id, forward_cost=0) as engine:
        plain = engine.compile(requests, "plain")
        # forks and trees must save more than the prefix alone
        prefix_tokens = engine.compile(requests, "prefix").tokens
        expected = engine.run(plain).sums
        few = requests[::_CONTINUATIONS]  # one of each context: a row alone takes as long as all others
        alone = torch.cat([engine.score([request], "plain").sums for request in few])
        noise = float(((expected[::_CONTINUATIONS] - alone).abs() / lengths[::_CONTINUATIONS]).max())
        trial = _Trial(
            requests,
            changed,
            [i for i, request in enumerate(requests) if request.context == requests[0].context],
            expected,
            lengths,
            tolerance=_tolerance(engine.facts.dtype, noise, float((expected / lengths).abs().max())),
        )
        reason = f"differs by {noise:.1e} nats a token between batches"
        verifications = {"plain": Verification(True, reason)}
        for optimization in OPTIMIZATIONS[:-1]:
            limit = plain.tokens if optimization == "prefix" else prefix_tokens
            verifications[optimization] = _verify(engine, optimization, trial, limit)
    return verifications


def _tolerance(dtype: torch.dtype, noise: float, largest: float) -> float:
    """Nats per token that rounding alone may move a score by.

    noise: by what plain scores differ between batches; largest: nats of a token, beside which half precision
    rounds: random tokens are far less likely to a trained model than to a random one.
    """
    rounding = torch.finfo(dtype).eps * largest if dtype in (torch.float16, torch.bfloat16) else 0.0
    return max(_NOISE_FACTOR * noise, _TOLERANCE.get(dtype, 1e-2), rounding)


def _verify(engine: Engine, optimization: Optimization, trial: _Trial, token_limit: int) -> Verification:
    """Verifies one optimization, which must compute fewer tokens than `token_limit`."""
    try:
        plan = engine.compile(trial.requests, optimization)
        scores = engine.run(plan).sums
        moved = engine.score(trial.changed, optimization).sums
    except Exception as error:  # a model may raise anything at inputs it was not made for
        return Verification(False, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    difference = float(((scores - trial.expected).abs() / trial.lengths).max())
    leak = float(((moved - scores).abs() / trial.lengths)[trial.unchanged].max())
    reason = (
        f"differs by {difference:.1e}, leaks {leak:.1e} nats a token, {plan.tokens} of {token_limit} tokens"
    )
    exact = difference <= trial.tolerance and leak <= trial.tolerance  # NaN compares as wrong
    return Verification(exact and plan.tokens < token_limit, reason)


def _requests(model: nn.Module, rnd: random.Random, shared: int) -> tuple[list[Request], list[Request]]:
    """Three contexts after one prefix with three continuations each, and the same with other tokens.

    The first context's requests are the same in both.
    """
    size = vocabulary(model)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(size) for _ in range(count))

    prefix = tokens(shared)
    requests: list[Request] = []
    changed: list[Request] = []
    for item in range(_CONTEXTS):
        length = rnd.randrange(_CONTEXT // 2, _CONTEXT)
        context = prefix + tokens(length)
        continuations = [tokens(rnd.randrange(2, 6)) for _ in range(_CONTINUATIONS)]
        continuations[1] = continuations[0][:1] + tokens(2)  # two that begin alike
        requests += [Request(context, continuation) for continuation in continuations]
        other = context if item == 0 else prefix + tokens(length)
        changed += [Request(other, c if item == 0 else tokens(len(c))) for c in continuations]
    return requests, changed
