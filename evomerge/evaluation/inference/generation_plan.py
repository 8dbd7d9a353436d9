"""What every greedy decoder shares: the prompts as tensors, what they share, and the texts as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.logits_processors import process
from evomerge.evaluation.inference.stop_strings import Stops


@dataclass(frozen=True, slots=True)
class Level:
    """Beginnings that several prompts share: ids [r, s] at positions [r, s]; index [n]: the row each of the next n rows goes on from."""

    ids: Tensor
    positions: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompts that are prefilled together.

    requests: their numbers; prefix: the number of the prefix they all begin with; levels: what they share beyond it; ids
    [b, S]: the rest; rows [b]: where each row's logits are read in [b * S]; positions [b, S]; mask [b, S] of padding, or
    None; lengths: tokens of each prompt, all of it. Without padding (`lockstep`) ids ends where the shortest prompt does:
    the rest of longer ones is fed token by token.
    """

    requests: tuple[int, ...]
    prefix: int | None
    levels: tuple[Level, ...]
    ids: Tensor
    rows: Tensor
    positions: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Prompts ready to be decoded any number of times.

    prompts: distinct ones; limits: most new tokens of each; places: of each prompt asked for, its number among them;
    prefixes: shared beginnings [1, P]; chunks: in the order in which they are prefilled; processors: of each prompt, or None.
    slots: rows that run at once; length: positions that a row needs.
    """

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    places: tuple[int, ...]
    stops: Stops
    processors: list[Any] | None
    decoder: str
    prefixes: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    slots: int
    length: int


def shared(forward: Forward, chunk: Chunk, prefix: Any, *, windowed: bool) -> Any:
    """The cache [b] of what the prompts of a chunk share; prefix: the cache of its prefix, or None."""
    first = chunk.levels[0].ids if chunk.levels else chunk.ids
    past = (
        kv_cache.new_cache(forward.model, windowed=windowed)
        if prefix is None
        else kv_cache.fork(prefix, rows=len(first))
    )
    for level in chunk.levels:
        forward(forward.first, level.ids, past, positions=level.positions)
        past = kv_cache.fork(past, index=level.index)
    return past


class Texts:
    """Generated tokens of every prompt of a plan. trace: the logits that each token was taken from are kept as well."""

    def __init__(self, plan: GenerationPlan, eos_ids: frozenset[int], *, trace: bool = False) -> None:
        self._plan, self._eos = plan, eos_ids
        self.tokens: list[list[int]] = [[] for _ in plan.prompts]
        self.trace: list[list[Tensor]] | None = [[] for _ in plan.prompts] if trace else None

    def add(self, requests: Sequence[int], logits: Tensor) -> tuple[list[int], list[int]]:
        """Appends the likeliest token of each request from logits [n, V]: (tokens [n], places in [0, n) of rows that go on).

        The token that ends a text is kept: HFLM decodes it with the rest.
        """
        plan = self._plan
        if self.trace is not None:
            for request, row in zip(requests, logits.float().cpu(), strict=True):
                self.trace[request].append(row)
        if plan.processors is not None:
            rows = [
                process(plan.processors[r], plan.prompts[r], self.tokens[r], row)
                for r, row in zip(requests, logits, strict=True)
            ]
            logits = torch.stack(rows)
        new: list[int] = logits.argmax(-1).tolist()
        hit, eos, limits, going = plan.stops.hit, self._eos, plan.limits, []
        for place, (request, token) in enumerate(zip(requests, new, strict=True)):
            text = self.tokens[request]
            text.append(token)
            if token not in eos and len(text) < limits[request] and not hit(text):
                going.append(place)
        return new, going
