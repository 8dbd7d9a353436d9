"""Greedy decoding in slots: every running request has a row of one key-value buffer a layer.

A row's tokens lie at their own positions 0, 1, ... and each new one is written at the row's next position, so that rows of
different lengths run together without padding; what a row has not written yet is masked. A finished row's place is taken by
the last running one, and free rows are filled by prefilling the next prompts. A shared prefix is prefilled
once and copied into its rows (slots x prefix of memory). For models whose layers only attend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from evomerge.evaluation.inference.attention_masks import FULL, attention_mask
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.generation_plan import Chunk, GenerationPlan, Texts, shared


class _State:
    """Where this step's tokens go: rows [n] and positions [n], of which the first `seen` positions are attended."""

    rows: Tensor
    positions: Tensor
    seen: int


class _SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of transformers' Cache over a buffer [slots, heads, length, width]; it takes one token a row, in place."""

    is_croppable = False

    def __init__(self, like: Any, slots: int, length: int, state: _State) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.keys, self.values = (
            t.new_empty(slots, t.shape[1], length, t.shape[3]) for t in (like.keys, like.values)
        )
        self.state = state

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, seen, D] with the new ones [n, H, 1, D] in their places."""
        state = self.state
        rows = state.rows.numel()
        self.keys[state.rows, :, state.positions] = key_states[:, :, 0]
        self.values[state.rows, :, state.positions] = value_states[:, :, 0]
        return self.keys[:rows, :, : state.seen], self.values[:rows, :, : state.seen]

    def get_seq_length(self) -> int:
        """Tokens before this step's, in the longest row."""
        return self.state.seen - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset)."""
        return self.state.seen, 0


class _Slots:
    """The buffers of a run and which request is in which row: rows [0, len(requests)) run."""

    def __init__(self, forward: Forward, plan: GenerationPlan) -> None:
        self.forward, self.plan, self.state = forward, plan, _State()
        self.requests: list[int] = []
        self.lengths: list[int] = []  # positions written
        self.last: list[int] = []  # tokens that are not written yet
        self.past: Any = None

    def admit(self, chunk: Chunk, past: Any, places: list[int], new: list[int]) -> None:
        """Gives rows to those prompts of a chunk, prefilled in `past`, whose first token did not end them."""
        if self.past is None:
            layers = [
                _SlotLayer(x, self.plan.slots, self.plan.length, self.state) if x.is_initialized else x
                for x in past.layers
            ]
            self.past = Cache(layers=layers)
        first, count = len(self.requests), len(places)
        every = count == len(chunk.requests)
        index = torch.tensor(places, device=self.forward.device)
        for layer, source in zip(self.past.layers, past.layers, strict=True):
            if not source.is_initialized:
                continue
            for buffer, given in ((layer.keys, source.keys), (layer.values, source.values)):
                written = given.shape[2]
                buffer[first : first + count, :, :written] = given if every else given.index_select(0, index)
                buffer[first : first + count, :, written:] = 0  # masked, but 0 x NaN would be NaN
        self.requests += [chunk.requests[p] for p in places]
        self.lengths += [chunk.lengths[p] for p in places]
        self.last += [new[p] for p in places]

    def step(self) -> Tensor:
        """Feeds every running row its last token: logits [n, V]."""
        forward, state, count = self.forward, self.state, len(self.requests)
        state.seen = max(self.lengths) + 1
        state.rows = torch.arange(count, device=forward.device)
        state.positions = torch.tensor(self.lengths, device=forward.device)
        ids = torch.tensor(self.last, device=forward.device)[:, None]
        keys = torch.arange(state.seen, device=forward.device)[None]
        queries = state.positions[:, None]
        seen = keys <= queries
        limits = forward.limits
        plain = limits.types == (FULL,) or (limits.types is None and not limits.window)
        mask: Any = seen.long()  # [n, L] of tokens, which ALiBi models count
        if not plain:
            mask = attention_mask(limits, seen[:, None], queries, keys.expand(count, -1), forward.dtype)
        logits = forward(state.rows, ids, self.past, positions=queries, mask=mask)
        self.lengths = [n + 1 for n in self.lengths]
        return logits

    def keep(self, going: list[int], new: list[int]) -> None:
        """Ends all rows but `going`, whose last tokens are new; the last of them move into the places of ended ones."""
        count, left = len(self.requests), len(going)
        if left < count:
            stay = set(going)
            holes = [row for row in range(left) if row not in stay]
            movers = going[left - len(holes) :]
            if holes:
                most = max(self.lengths[row] for row in movers)
                into, out = (torch.tensor(x, device=self.forward.device) for x in (holes, movers))
                for layer in self.past.layers:
                    if layer.is_initialized:
                        for buffer in (layer.keys, layer.values):
                            buffer[into, :, :most] = buffer[out, :, :most]
            order = list(range(left))
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
            self.requests = [self.requests[row] for row in order]
            self.lengths = [self.lengths[row] for row in order]
            new = [new[row] for row in order]
        self.last = new


def decode(plan: GenerationPlan, forward: Forward, texts: Texts) -> None:
    """Decodes every chunk of a plan into texts."""
    slots = _Slots(forward, plan)
    number, prefix = None, None
    waiting = 0
    while waiting < len(plan.chunks) or slots.requests:
        while (
            waiting < len(plan.chunks)
            and len(slots.requests) + len(plan.chunks[waiting].requests) <= plan.slots
        ):
            chunk = plan.chunks[waiting]
            waiting += 1
            if chunk.prefix != number:
                number = chunk.prefix
                prefix = None if number is None else forward.prefill(plan.prefixes[number], windowed=False)
            past = shared(forward, chunk, prefix, windowed=False)
            logits = forward(chunk.rows, chunk.ids, past, positions=chunk.positions)
            new, going = texts.add(chunk.requests, logits)
            if going:
                slots.admit(chunk, past, going, new)
        if slots.requests:
            new, going = texts.add(slots.requests, slots.step())
            slots.keep(going, new)
