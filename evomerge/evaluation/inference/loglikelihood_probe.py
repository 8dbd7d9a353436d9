"""Which techniques a model can be trusted with: decided by numbers on random tokens, never by a list of names.

A technique is allowed if its scores equal the plain rows' (equality), if a row's scores do not move when its neighbours'
tokens change (isolation), and if it really computed fewer tokens: a technique that fell back to plain rows proves nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.forward import vocabulary
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import OPTIMIZATIONS, Optimization
from evomerge.evaluation.inference.requests import Request, Verification

_FLOOR = {
    torch.float32: 2e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}  # nats a token that rounding alone may move
_FACTOR = 8.0  # tolerance over the spread of plain scores between batch compositions
_CONTEXT, _SHARED = 16, 24


def probe(
    model: nn.Module, *, span: int = 0, max_length: int = 1 << 20, pad_id: int = 0, seed: int = 0
) -> dict[str, Verification]:
    """Technique -> verdict. span: length of the longest request that will come, so that windows show; the model's weights matter little."""
    rnd = random.Random(seed)
    shared = max(16, min(max(_SHARED, span - _CONTEXT), max_length - 2 * _CONTEXT - 8))
    requests, changed = _requests(model, rnd, shared)
    lengths = torch.tensor([len(r.continuation) for r in requests])
    own = [i for i, r in enumerate(requests) if r.context == requests[0].context]
    with Engine(model, pad_id=pad_id, launch=0) as engine:
        plain = engine.compile(requests, "plain")
        rows = engine.compile(
            requests, "prefix"
        ).tokens  # forks and trees must save more than the prefix alone
        wanted = engine.run(plain).sums
        alone = torch.cat([engine.score([r], "plain").sums for r in requests])
        noise = float(((wanted - alone).abs() / lengths).max())
        tolerance = max(_FACTOR * noise, _FLOOR.get(engine.facts.dtype, 1e-2))
        found = {"plain": Verification(True, f"differs by {noise:.1e} nats a token between batches")}
        for technique in OPTIMIZATIONS[:-1]:
            found[technique] = _verdict(
                engine,
                technique,
                requests,
                changed,
                wanted,
                lengths,
                own,
                plain.tokens if technique == "prefix" else rows,
                tolerance,
            )
    return found


def _verdict(
    engine: Engine,
    technique: Optimization,
    requests: Sequence[Request],
    changed: Sequence[Request],
    wanted: Tensor,
    lengths: Tensor,
    own: Sequence[int],
    most: int,
    tolerance: float,
) -> Verification:
    """One technique: own are the requests whose tokens are the same in `changed`; most: tokens that it has to stay under."""
    try:
        plan = engine.compile(requests, technique)
        scores = engine.run(plan).sums
        moved = engine.score(changed, technique).sums
    except Exception as error:  # a model may raise anything at inputs it was not made for
        return Verification(False, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    difference = float(((scores - wanted).abs() / lengths).max())
    leak = float(((moved - scores).abs() / lengths)[own].max())
    said = f"differs by {difference:.1e}, leaks {leak:.1e} nats a token, {plan.tokens} of {most} tokens"
    return Verification(difference <= tolerance and leak <= tolerance and plan.tokens < most, said)


def _requests(model: nn.Module, rnd: random.Random, shared: int) -> tuple[list[Request], list[Request]]:
    """Four contexts after one prefix with three continuations each, and the same with all but the first item's tokens changed."""
    size = vocabulary(model)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(size) for _ in range(count))

    prefix = tokens(shared)
    requests: list[Request] = []
    changed: list[Request] = []
    for item in range(4):
        length = rnd.randrange(_CONTEXT // 2, _CONTEXT)
        context = prefix + tokens(length)
        continuations = [tokens(rnd.randrange(2, 6)) for _ in range(3)]
        continuations[1] = continuations[0][:1] + tokens(2)  # two that begin alike
        requests += [Request(context, c) for c in continuations]
        other = context if item == 0 else prefix + tokens(length)
        changed += [Request(other, c if item == 0 else tokens(len(c))) for c in continuations]
    return requests, changed
