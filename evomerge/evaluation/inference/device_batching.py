"""Continuous batching whose state lies on the device: a step of decoding asks the host for nothing.

Every running prompt has a row of key-value buffers of a fixed size, as in `continuous_batching`. Positions,
last tokens, which rows run and how many tokens they may still take are tensors that the step itself advances,
so that all steps have one shape and one graph. The host reads the tokens of several steps at a time, while
the next ones are under way: it looks for stop strings, drops what a row generated beyond one, and gives the
row to another prompt. For models whose layers only attend; not for logits processors, which run on the host.

The graph has run on no card so far; tests use a stand-in for torch's graphs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from evomerge.evaluation.inference.attention_masks import FULL, attention_mask
from evomerge.evaluation.inference.cuda_graphs import (
    Addresses,
    CudaGraphs,
    Graph,
    addresses,
    captured,
    is_static,
)
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.generation_plan import Chunk, GenerationPlan, Prefiller, Texts

log = logging.getLogger(__name__)
STEPS = 8
"""Steps whose tokens the host reads at once."""
_ROWS = (8, 16, 32, 64, 128, 256, 512)
_LENGTHS = (128, 256, 512, 1024, 2048)
_LENGTH_UNIT = 1024  # beyond the last of them


def bucket_rows(prompts: int, most: int) -> int:
    """Chooses how many rows the buffers have, one of a few numbers.

    Args:
        prompts: How many prompts there are, at least 1.
        most: How many rows memory takes, at least 1.

    Returns:
        The smallest of 8, 16, ... 512 that holds all prompts, else the largest that memory takes; `most`
        itself where that is less than 8.
    """
    fitting = [rows for rows in _ROWS if rows <= most]
    return next((rows for rows in fitting if rows >= prompts), fitting[-1] if fitting else most)


def bucket_length(length: int) -> int:
    """Chooses how many positions a row has, one of a few numbers.

    Args:
        length: Tokens of the longest prompt with its answer.

    Returns:
        The smallest of 128, 256, ... 2048, 3072, 4096, ... that holds them.
    """
    wanted = -(-length // _LENGTH_UNIT) * _LENGTH_UNIT
    return next((size for size in _LENGTHS if size >= length), wanted)


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer of transformers' Cache over buffers [rows, heads, length, width].

    It takes one token a row, in place, and gives the whole buffers: no head is copied.
    """

    is_croppable = False

    def __init__(self, like: Any, rows: Tensor, positions: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.rows, self.positions, self.length = rows, positions, length
        shape = (len(rows), like.keys.shape[1], length)
        self.keys = like.keys.new_zeros(*shape, like.keys.shape[3])
        self.values = like.values.new_zeros(*shape, like.values.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, H, length, D] with the new ones [rows, H, 1, D] in their places."""
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before this step's, as far as shapes go."""
        return self.length - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset)."""
        return self.length, 0


@dataclass(slots=True)
class _Block:
    """Steps that were launched.

    requests: of each row when they were launched, None for a free row; tokens: [rows, steps], on their way to
    the host; done: when they are there, None for at once; logits: of each step, where they are traced.
    """

    requests: tuple[int | None, ...]
    tokens: Tensor
    done: torch.cuda.Event | None
    logits: list[Tensor]


class DeviceBatch:
    """Buffers and state of one bucket, kept from plan to plan so that its graph stays valid.

    Attributes:
        forward: The model.
        rows: Number of rows.
        length: Number of positions of a row.
        positions: [rows] where each row's last token is to be written.
        last: [rows] tokens that are not written yet.
        left: [rows] how many more tokens each row may take.
        running: [rows] whether it takes any.
        tokens: [rows, STEPS] what the steps since the last reading took.
        step_number: [1] how many these are.
        refusal: Why steps are not captured; None while they are or may be.
    """

    def __init__(
        self,
        forward: Forward,
        rows: int,
        length: int,
        eos_ids: frozenset[int],
        graphs: CudaGraphs | None = None,
    ) -> None:
        """Makes the state; buffers come with the first prompts.

        Args:
            forward: The model.
            rows: Number of rows.
            length: Number of positions of a row.
            eos_ids: Token ids that end a text.
            graphs: Where a step is captured; None to run each from Python.
        """
        self.forward, self.rows, self.length = forward, rows, length
        device = forward.device
        self._index = torch.arange(rows, device=device)
        self._keys = torch.arange(length, device=device)[None]
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self.positions, self.last, self.left = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3)
        )
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(rows, STEPS, dtype=torch.long, device=device)
        self.step_number = torch.zeros(1, dtype=torch.long, device=device)
        self.refusal: str | None = None
        self._past: Any = None
        self._logits: Tensor | None = None
        self._graphs = graphs
        self._graph: Graph | None = None
        self._addresses: Addresses | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._buffers())

    def clear(self) -> None:
        """Empties all rows, and forgets a graph of weights that are elsewhere now."""
        for tensor in (*self._buffers(), self.positions, self.last, self.left, self.running):
            tensor.zero_()  # what is masked counts, too: 0 x NaN of another candidate would be NaN
        if self._addresses is not None and not self._addresses.hold(self.forward.model):
            self._graph = self._addresses = None

    def admit(
        self, rows: Sequence[int], past: Any, places: Sequence[int], starts: Sequence[tuple[int, int, int]]
    ) -> None:
        """Gives rows to prefilled prompts.

        Args:
            rows: Free rows.
            past: Cache of prefilled prompts.
            places: Of each row, the prompt's row in that cache.
            starts: Of each row (tokens of the prompt, first generated token, how many more it may take).
        """
        if self._past is None:
            self._past = self._buffers_like(past)
        into, out = self._on_device(rows), self._on_device(places)
        for layer, source in zip(self._past.layers, past.layers, strict=True):
            if not source.is_initialized:
                continue
            for buffer, prefilled in ((layer.keys, source.keys), (layer.values, source.values)):
                buffer[into, :, : prefilled.shape[2]] = prefilled.index_select(0, out)
        positions, last, left = self._on_device(starts).unbind(1)
        self.positions[into], self.last[into], self.left[into] = positions, last, left
        self.running[into] = left > 0

    def launch(self, steps: int, requests: Sequence[int | None], *, trace: bool) -> _Block:
        """Starts steps, and the transfer of their tokens to the host.

        Args:
            steps: How many, at most `STEPS`.
            requests: Of each row the request that is in it.
            trace: Whether to keep the logits of every step.

        Returns:
            What was started.
        """
        self.step_number.zero_()
        logits = []
        for _ in range(steps):
            if trace:
                self._step()
                assert self._logits is not None
                logits.append(self._logits)
            else:
                self._advance()
        tokens = self.tokens[:, :steps]
        if tokens.device.type != "cuda":
            return _Block(tuple(requests), tokens.clone(), None, logits)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return _Block(tuple(requests), host, done, logits)

    # ---- a step --------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """A step, replayed where that is possible."""
        if self._graph is not None:
            self._graph.replay()
        elif self._graphs is None or self.refusal is not None:
            self._step()
        else:
            self._capture(self._graphs)

    def _capture(self, graphs: CudaGraphs) -> None:
        """A step that is captured on the way."""
        state = (self.positions, self.last, self.left, self.running, self.tokens, self.step_number)
        found: list[Graph] | str = "weights of the model are computed in its forward"
        if is_static(self.forward.model):
            found = captured(graphs, state, [self._step], lambda: self._logits)
        else:
            self._step()
        if isinstance(found, str):
            self.refusal = found
            log.info("decoding without CUDA graphs: %s", found)
        else:
            self._graph = found[0]
            self._addresses = addresses(self.forward.model)

    def _step(self) -> None:
        """Feeds every row its last token; takes the likeliest next one in those that run."""
        logits = self.forward(
            self._index, self.last[:, None], self._past, positions=self.positions[:, None], mask=self._mask()
        )
        self._logits = logits
        new = torch.where(self.running, logits.argmax(-1), self.last)
        self.tokens.index_copy_(1, self.step_number, new[:, None])
        self.step_number.add_(1)
        self.last.copy_(new)
        self.positions.add_(self.running)
        self.left.sub_(self.running.long())
        ended = (new[:, None] == self._eos).any(1)
        self.running.logical_and_(~ended & (self.left > 0))

    def _mask(self) -> Any:
        """What each row attends to: its own positions, the one that is written now included."""
        limits = self.forward.limits
        seen = self._keys <= self.positions[:, None]
        config: Any = self.forward.model.config
        if self.forward.takes_positions and config._attn_implementation == "sdpa":
            queries, keys = self.positions[:, None], self._keys.expand(self.rows, -1)
            return attention_mask(limits, seen[:, None], queries, keys, torch.bool)
        if limits.types == (FULL,) or (limits.types is None and not limits.window):
            return seen.long()  # of tokens, which ALiBi models count
        queries, keys = self.positions[:, None], self._keys.expand(self.rows, -1)
        return attention_mask(limits, seen[:, None], queries, keys, self.forward.dtype)

    # ---- buffers -------------------------------------------------------------------------------------------

    def _buffers_like(self, past: Any) -> Any:
        """A cache of buffers for layers like those of a prefilled cache."""
        layers = [
            _Layer(layer, self._index, self.positions, self.length) if layer.is_initialized else layer
            for layer in past.layers
        ]
        return Cache(layers=layers)

    def _buffers(self) -> list[Tensor]:
        layers = () if self._past is None else self._past.layers
        return [t for layer in layers if layer.is_initialized for t in (layer.keys, layer.values)]

    def _on_device(self, values: Sequence[Any]) -> Tensor:
        """Whole numbers as a tensor on the device, without waiting for what is under way there."""
        found = torch.tensor(list(values), dtype=torch.long)
        if self.forward.device.type != "cuda":
            return found.to(self.forward.device)
        return found.pin_memory().to(self.forward.device, non_blocking=True)


@dataclass(slots=True)
class _Run:
    """What the host knows of a run.

    rows: of each row, the request in it, None for a free row; left: of each row, how many of its tokens are
    not launched; ended: of each request, whether its text is complete.
    """

    rows: list[int | None]
    left: list[int]
    ended: set[int]

    def free(self) -> list[int]:
        return [row for row, request in enumerate(self.rows) if request is None]

    def steps(self) -> int:
        """How many steps can be launched at once."""
        left = [self.left[row] for row, request in enumerate(self.rows) if request is not None]
        return max(0, min(STEPS, max(left, default=0)))

    def launched(self, steps: int) -> None:
        self.left = [left - steps for left in self.left]


def decode(plan: GenerationPlan, forward: Forward, texts: Texts, batch: DeviceBatch) -> None:
    """Decodes every chunk of a plan.

    Args:
        plan: The plan, without logits processors.
        forward: The model.
        texts: Where tokens are added.
        batch: Buffers of at least the plan's length, and at least as many rows as a chunk has.
    """
    batch.clear()
    run = _Run([None] * batch.rows, [0] * batch.rows, set())
    prefiller = Prefiller(plan, forward)
    waiting = deque(plan.chunks)
    blocks: deque[_Block] = deque()
    while True:
        while waiting and len(waiting[0].requests) <= len(run.free()):
            _admit(waiting.popleft(), prefiller, texts, batch, run)
        steps = run.steps()
        if steps:
            blocks.append(batch.launch(steps, run.rows, trace=texts.trace is not None))
            run.launched(steps)
        if len(blocks) > 1 or (blocks and not steps):
            _read(blocks.popleft(), texts, run)
        elif not steps and not waiting:
            return


def _admit(chunk: Chunk, prefiller: Prefiller, texts: Texts, batch: DeviceBatch, run: _Run) -> None:
    """Prefills a chunk, and gives rows to those of its prompts whose first token did not end them."""
    past, logits = prefiller(chunk)
    new, going = texts.add(chunk.requests, logits)
    rows = run.free()[: len(going)]
    starts = []
    for row, place in zip(rows, going, strict=True):
        request = chunk.requests[place]
        run.rows[row], run.left[row] = request, texts.limit(request) - 1
        starts.append((chunk.lengths[place], new[place], run.left[row]))
    if going:
        batch.admit(rows, past, going, starts)


def _read(block: _Block, texts: Texts, run: _Run) -> None:
    """Adds a block's tokens to the texts, up to the one that ends each; the rows of ended texts are free."""
    if block.done is not None:
        block.done.synchronize()
    tokens: list[list[int]] = block.tokens.tolist()
    for row, request in enumerate(block.requests):
        if request is None or request in run.ended:
            continue  # it ended in a block that was read after this one was launched
        for step, token in enumerate(tokens[row]):
            logits = block.logits[step][row] if block.logits else None
            if not texts.append(request, token, logits):
                run.ended.add(request)
                run.rows[row] = None
                break
