"""Continuous batching of greedy decoding: every running prompt has a row of one key-value buffer a layer.

A row's tokens lie at their own positions 0, 1, ... and each new one is written at the row's next position, so
that rows of different lengths run together without padding; what a row has not written yet is masked. A
finished row's place is taken by the last running one, and free rows are filled by prefilling the next
prompts. A shared prefix is prefilled once and copied into its rows (rows x prefix of memory). For models
whose layers only attend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from evomerge.evaluation.inference.attention_masks import FULL, attention_mask
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.generation_plan import Chunk, GenerationPlan, Prefiller, Texts


class _WriteState:
    """Where this step's tokens go.

    Rows [n] and positions [n], of which the first `seen` positions are attended.
    """

    rows: Tensor
    positions: Tensor
    seen: int


class _BufferLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of transformers' Cache over a buffer [rows, heads, length, width].

    It takes one token a row, in place.
    """

    is_croppable = False

    def __init__(self, like: Any, rows: int, length: int, state: _WriteState) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.keys = like.keys.new_empty(rows, like.keys.shape[1], length, like.keys.shape[3])
        self.values = like.values.new_empty(rows, like.values.shape[1], length, like.values.shape[3])
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


class _Batch:
    """The buffers of a run and which request is in which row: rows [0, len(requests)) run."""

    def __init__(self, forward: Forward, plan: GenerationPlan) -> None:
        self.forward, self.plan, self.state = forward, plan, _WriteState()
        self.requests: list[int] = []
        self.lengths: list[int] = []  # positions written
        self.last: list[int] = []  # tokens that are not written yet
        self.past: Any = None

    def admit(self, chunk: Chunk, past: Any, places: list[int], new: list[int]) -> None:
        """Gives rows to those prompts of a chunk, prefilled in `past`, whose first token did not end them."""
        if self.past is None:
            self.past = self._buffers(past)
        first, count = len(self.requests), len(places)
        whole_chunk = count == len(chunk.requests)
        index = torch.tensor(places, device=self.forward.device)
        for layer, source in zip(self.past.layers, past.layers, strict=True):
            if not source.is_initialized:
                continue
            for buffer, prefilled in ((layer.keys, source.keys), (layer.values, source.values)):
                written = prefilled.shape[2]
                rows = prefilled if whole_chunk else prefilled.index_select(0, index.to(prefilled.device))
                buffer[first : first + count, :, :written] = rows
                buffer[first : first + count, :, written:] = 0  # masked, but 0 x NaN would be NaN
        self.requests += [chunk.requests[place] for place in places]
        self.lengths += [chunk.lengths[place] for place in places]
        self.last += [new[place] for place in places]

    def _buffers(self, past: Any) -> Any:
        """A cache of buffers for layers like those of a prefilled cache."""
        layers = [
            _BufferLayer(layer, self.plan.rows, self.plan.length, self.state)
            if layer.is_initialized
            else layer
            for layer in past.layers
        ]
        return Cache(layers=layers)

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
        unlimited = limits.types == (FULL,) or (limits.types is None and not limits.window)
        mask: Any = seen.long()  # [n, L] of tokens, which ALiBi models count
        if not unlimited:
            mask = attention_mask(limits, seen[:, None], queries, keys.expand(count, -1), forward.dtype)
        logits = forward(state.rows, ids, self.past, positions=queries, mask=mask)
        self.lengths = [n + 1 for n in self.lengths]
        return logits

    def keep(self, going: list[int], new: list[int]) -> None:
        """Ends all rows but `going`, whose last tokens are new.

        The last of them move into the places of ended ones.
        """
        count, left = len(self.requests), len(going)
        if left < count:
            running = set(going)
            free = [row for row in range(left) if row not in running]
            movers = going[left - len(free) :]
            if free:
                self._move(movers, free)
            order = list(range(left))
            for place, mover in zip(free, movers, strict=True):
                order[place] = mover
            self.requests = [self.requests[row] for row in order]
            self.lengths = [self.lengths[row] for row in order]
            new = [new[row] for row in order]
        self.last = new

    def _move(self, sources: list[int], targets: list[int]) -> None:
        """Copies rows of the buffers onto others."""
        longest = max(self.lengths[row] for row in sources)
        into = torch.tensor(targets, device=self.forward.device)
        out = torch.tensor(sources, device=self.forward.device)
        for layer in self.past.layers:
            if layer.is_initialized:
                for buffer in (layer.keys, layer.values):
                    buffer[into, :, :longest] = buffer[out, :, :longest]


def decode(plan: GenerationPlan, forward: Forward, texts: Texts) -> None:
    """Decodes every chunk of a plan.

    Args:
        plan: The plan.
        forward: The model.
        texts: Where tokens are added.
    """
    batch = _Batch(forward, plan)
    prefiller = Prefiller(plan, forward)
    waiting = 0  # index of the next chunk
    while waiting < len(plan.chunks) or batch.requests:
        while waiting < len(plan.chunks):
            chunk = plan.chunks[waiting]
            if len(batch.requests) + len(chunk.requests) > plan.rows:
                break
            waiting += 1
            past, logits = prefiller(chunk)
            new, going = texts.add(chunk.requests, logits)
            if going:
                batch.admit(chunk, past, going, new)
        if batch.requests:
            new, going = texts.add(batch.requests, batch.step())
            batch.keep(going, new)
