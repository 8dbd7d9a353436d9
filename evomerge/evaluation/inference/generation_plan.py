"""Plans of greedy generation: prompts -> batches as tensors, what they share, and the texts as they grow.

A plan is made once and decoded for every candidate. `make_batches` decides which prompts are prefilled
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.logits_processors import process
from evomerge.evaluation.inference.prefix_tree import common_prefix_length, shared_prefixes
from evomerge.evaluation.inference.shared_prefill import cut_depths, levels
from evomerge.evaluation.inference.stop_strings import Stops

Layout = Literal["slots", "padded", "equal"]
"""How rows of different lengths are laid out: padded on the right, on the left, or not at all."""
_LENGTH_STEP = (
    1.1  # lengths of prompts that are prefilled together in slots differ by about this factor at most
)
# forwards that a prefix of several chunks must save: what one chunk shares is saved by its levels anyway
_SPLIT = 8
_SHARED = 4  # a chunk that shares much may hold so many times the tokens of one forward
_MAX_PADDING = 0.15  # most padding of a chunk over its tokens, where it is more than a forward costs
_MAX_SPREAD = 64  # most tokens by which prompts of an unpadded batch differ


@dataclass(frozen=True, slots=True)
class Level:
    """Beginnings that several prompts of a chunk share.

    Attributes:
        ids: [r, s] token ids.
        positions: [r, s] logical positions.
        index: [n] of each of the n rows that follow, the row that it continues.
    """

    ids: Tensor
    positions: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompts that are prefilled together.

    Attributes:
        requests: Indices of the prompts.
        prefix: Index of the prefix that they all begin with; None for none.
        levels: What they share beyond it.
        ids: [b, S] the rest of their tokens. Without padding (layout 'equal') it ends where the shortest
            prompt does, and the rest of longer ones is fed token by token.
        rows: [b] flat indices into [b * S] where each prompt's logits are read.
        positions: [b, S] logical positions.
        mask: [b, S] 0 where there is padding on the left, else 1; None without such padding.
        lengths: Number of tokens of each whole prompt.
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

    Attributes:
        prompts: The distinct prompts.
        limits: Most new tokens of each.
        places: Of every given prompt, its index among the distinct ones.
        stops: Stop strings.
        processors: Logits processors of each prompt; None for none.
        decoder: Name of the decoder.
        prefixes: Shared beginnings, [1, P] each.
        chunks: In the order in which they are prefilled.
        rows: How many prompts run at once.
        length: Number of positions that a row needs.
    """

    prompts: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    places: tuple[int, ...]
    stops: Stops
    processors: list[Any] | None
    decoder: str
    prefixes: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    rows: int
    length: int


# ---- which prompts are prefilled together ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchingRules:
    """What decides which prompts are prefilled together.

    Attributes:
        decoder: Name of the decoder.
        shares: Whether prefixes may be shared.
        rows: How many prompts run at once.
        tokens: Most input tokens of one forward.
        forward_cost: What one more forward costs, in tokens.
        max_length: Number of the model's positions.
        pad_id: Token id that rows are padded with.
        device: Where tensors go.
    """

    decoder: str
    shares: bool
    rows: int
    tokens: int
    forward_cost: int
    max_length: int
    pad_id: int
    device: torch.device

    def layout(self, *, has_prefix: bool) -> Layout:
        """Chooses the layout of a chunk.

        Args:
            has_prefix: Whether its prompts continue the cache of a prefix, on top of which nothing is padded
                on the left.

        Returns:
            The layout.
        """
        if self.decoder == "slots":
            return "slots"
        if self.decoder == "padded" and not has_prefix:
            return "padded"
        return "equal"


def make_batches(
    prompts: Sequence[tuple[int, ...]], limits: Sequence[int], rules: BatchingRules
) -> tuple[tuple[Tensor, ...], tuple[Chunk, ...]]:
    """Splits prompts into chunks that are prefilled together.

    Args:
        prompts: Distinct prompts, token ids.
        limits: Most new tokens of each.
        rules: How to batch.

    Returns:
        (prefixes [1, P] that chunks share, chunks). Chunks of the longest prompts come first; those of one
        prefix follow each other.
    """
    groups: list[tuple[int, list[int]]] = []
    rest = list(range(len(prompts)))
    if rules.shares:
        # the last token is left to be read from
        groups, rest = shared_prefixes([prompt[:-1] for prompt in prompts], _SPLIT * rules.forward_cost)
    groups = [*groups, (0, rest)]
    groups.sort(key=lambda group: -max((len(prompts[i]) for i in group[1]), default=0))
    prefixes: list[Tensor] = []
    chunks: list[Chunk] = []
    for depth, members in groups:
        prefix = None
        if depth:
            prefix = len(prefixes)
            prefixes.append(torch.tensor([prompts[members[0]][:depth]], device=rules.device))
        layout = rules.layout(has_prefix=depth > 0)
        ordered = _in_prefill_order(members, prompts, layout)
        tails = [prompts[i][depth:] for i in ordered]
        for batch in _batches(tails, [limits[i] for i in ordered], layout, rules):
            requests = [ordered[k] for k in batch]
            chunks.append(_chunk([prompts[i] for i in requests], requests, prefix, depth, layout, rules))
    return tuple(prefixes), tuple(chunks)


def _in_prefill_order(
    members: Sequence[int], prompts: Sequence[tuple[int, ...]], layout: Layout
) -> list[int]:
    """Indices of prompts, the longest first."""
    return sorted(members, key=lambda i: (-_sort_length(prompts[i], layout), prompts[i]))


def _sort_length(prompt: Sequence[int], layout: Layout) -> int:
    """What prompts are sorted by.

    Their length, which for slots is rounded so that neighbours may begin alike, too.
    """
    return math.ceil(math.log(len(prompt), _LENGTH_STEP)) if layout == "slots" else len(prompt)


def _batches(
    tails: Sequence[tuple[int, ...]], limits: Sequence[int], layout: Layout, rules: BatchingRules
) -> Iterator[range]:
    """Places of the prompts that make one chunk each.

    tails: what follows their prefix, in the order to be prefilled.
    """
    max_rows = rules.rows
    if layout == "slots" and rules.rows < len(tails):
        max_rows = max(1, rules.rows // 4)  # a chunk waits until it fits
    longest_answer = max(limits, default=0)
    spread = min(_MAX_SPREAD, longest_answer) if layout == "equal" else rules.max_length
    forwards_saved = 1 if layout == "slots" else 1 + longest_answer  # by one chunk less
    tokens_saved = rules.forward_cost * forwards_saved
    start = 0
    while start < len(tails):
        first = len(tails[start])
        widest = total = first
        new = first  # tokens that no other row of the chunk begins with
        end = start + 1
        while end < len(tails) and end - start < max_rows and first - len(tails[end]) <= spread:
            size = len(tails[end])
            widest, total = max(widest, size), total + size
            shared = 0
            if rules.shares and layout != "padded":
                shared = common_prefix_length(tails[end - 1], tails[end])
            new += size - shared
            padded = (end - start + 1) * widest
            if new > rules.tokens or padded > _SHARED * rules.tokens:
                break
            if padded - total > max(tokens_saved, _MAX_PADDING * total):
                break
            end += 1
        yield range(start, end)
        start = end


def _chunk(
    prompts: Sequence[tuple[int, ...]],
    requests: Sequence[int],
    prefix: int | None,
    depth: int,
    layout: Layout,
    rules: BatchingRules,
) -> Chunk:
    """Tensors of prompts that are prefilled together after a prefix of `depth` tokens."""
    lengths = tuple(len(prompt) for prompt in prompts)
    tails = [prompt[depth:] for prompt in prompts]
    if layout == "padded":
        ids, mask, positions = _padded_left(tails, rules)
        rows = [(k + 1) * ids.shape[1] - 1 for k in range(len(tails))]
        return Chunk(
            tuple(requests),
            prefix,
            (),
            ids,
            torch.tensor(rows, device=rules.device),
            positions,
            mask,
            lengths,
        )
    width = max(map(len, tails)) if layout == "slots" else min(map(len, tails))
    depths = cut_depths(tails, width, rules.forward_cost) if rules.shares else []
    shared, start = _shared_levels(tails, depths, depth, rules.device)
    tails = [tail[start - depth :] for tail in tails]
    width -= start - depth
    ids = torch.tensor(
        [[*tail[:width], *[rules.pad_id] * (width - len(tail))] for tail in tails], device=rules.device
    )
    positions = torch.arange(start, start + width, device=rules.device).expand(len(tails), -1)
    rows = [k * width + min(len(tail), width) - 1 for k, tail in enumerate(tails)]
    return Chunk(
        tuple(requests),
        prefix,
        shared,
        ids,
        torch.tensor(rows, device=rules.device),
        positions,
        None,
        lengths,
    )


def _padded_left(tails: Sequence[tuple[int, ...]], rules: BatchingRules) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, positions), each [b, S]."""
    width = max(map(len, tails))
    ids = [[*[rules.pad_id] * (width - len(tail)), *tail] for tail in tails]
    mask = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=rules.device)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return torch.tensor(ids, device=rules.device), mask, positions


def _shared_levels(
    tails: Sequence[tuple[int, ...]], depths: Sequence[int], start: int, device: torch.device
) -> tuple[tuple[Level, ...], int]:
    """(levels of what follows position `start`, the position after the last of them)."""
    shared: list[Level] = []
    for tokens, index in levels(tails, depths):
        size = len(tokens[0])
        positions = torch.arange(start, start + size, device=device).expand(len(tokens), -1)
        shared.append(
            Level(torch.tensor(tokens, device=device), positions, torch.tensor(index, device=device))
        )
        start += size
    return tuple(shared), start


# ---- what every decoder shares -----------------------------------------------------------------------------


def shared_cache(forward: Forward, chunk: Chunk, prefix: Any, *, windowed: bool) -> Any:
    """Computes the cache of what the prompts of a chunk share.

    Args:
        forward: The model.
        chunk: The chunk, with b prompts.
        prefix: Cache of its prefix, one row; None for none.
        windowed: Whether a new cache has the model's own windows.

    Returns:
        A cache of b rows, empty where nothing is shared.
    """
    first = chunk.levels[0].ids if chunk.levels else chunk.ids
    if prefix is None:
        past = kv_cache.new_cache(forward.model, windowed=windowed)
    else:
        past = kv_cache.fork(prefix, rows=len(first))
    for level in chunk.levels:
        forward(forward.first, level.ids, past, positions=level.positions)
        past = kv_cache.fork(past, index=level.index)
    return past


class Prefiller:
    """Prefills chunks of slots, one after another: a prefix is computed once for those that follow it."""

    def __init__(self, plan: GenerationPlan, forward: Forward) -> None:
        """Starts before the first chunk.

        Args:
            plan: The plan.
            forward: The model.
        """
        self._plan, self._forward = plan, forward
        self._number: int | None = None
        self._prefix: Any = None

    def __call__(self, chunk: Chunk) -> tuple[Any, Tensor]:
        """Prefills a chunk.

        Args:
            chunk: The next of the plan's chunks, with b prompts.

        Returns:
            (cache of b rows with full length in every layer, logits [b, V] of each prompt's next token).
        """
        forward = self._forward
        if chunk.prefix != self._number:
            self._number, self._prefix = chunk.prefix, None
            if chunk.prefix is not None:
                self._prefix = forward.prefill(self._plan.prefixes[chunk.prefix], windowed=False)
        past = shared_cache(forward, chunk, self._prefix, windowed=False)
        return past, forward(chunk.rows, chunk.ids, past, positions=chunk.positions)


class Texts:
    """Generated tokens of every prompt of a plan.

    Attributes:
        tokens: Of each prompt, its generated token ids so far, the one that ends it included.
        trace: Of each prompt, the logits [V] that each token was taken from; None if they are not kept.
    """

    def __init__(self, plan: GenerationPlan, eos_ids: frozenset[int], *, trace: bool = False) -> None:
        """Starts with empty texts.

        Args:
            plan: The plan that is decoded.
            eos_ids: Token ids that end a text.
            trace: Whether to keep logits.
        """
        self._plan, self._eos = plan, eos_ids
        self.tokens: list[list[int]] = [[] for _ in plan.prompts]
        self.trace: list[list[Tensor]] | None = [[] for _ in plan.prompts] if trace else None

    def add(self, requests: Sequence[int], logits: Tensor) -> tuple[list[int], list[int]]:
        """Appends the likeliest token to n texts.

        The token that ends a text is kept: HFLM decodes it with the rest.

        Args:
            requests: Indices of the prompts.
            logits: [n, V] logits of their next tokens.

        Returns:
            (the tokens [n], places in [0, n) of the texts that go on).
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
        going = [
            place
            for place, (request, token) in enumerate(zip(requests, new, strict=True))
            if self._appended(request, token)
        ]
        return new, going

    def append(self, request: int, token: int, logits: Tensor | None = None) -> bool:
        """Appends a token that was taken elsewhere.

        Args:
            request: Index of the prompt.
            token: The token.
            logits: [V] that it was taken from; None where logits are not kept.

        Returns:
            Whether the text goes on.
        """
        if self.trace is not None and logits is not None:
            self.trace[request].append(logits.float().cpu())
        return self._appended(request, token)

    def limit(self, request: int) -> int:
        """Returns how many tokens a text may have.

        Args:
            request: Index of the prompt.

        Returns:
            The number, at least 1.
        """
        return self._plan.limits[request]

    def _appended(self, request: int, token: int) -> bool:
        """Appends a token; whether the text goes on."""
        text = self.tokens[request]
        text.append(token)
        plan = self._plan
        return token not in self._eos and len(text) < plan.limits[request] and not plan.stops.hit(text)
