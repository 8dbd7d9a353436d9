"""Plans of log-likelihood scoring: requests -> the forwards that answer them, as tensors.

Made once, replayed for every candidate.

Four ways to share computation, each more than the one before: 'plain' right-padded rows; 'prefix': a prefix
common to many contexts is computed once; 'fork': then also each context once, its choices as forks of its
cache; 'tree': its choices as one token tree under a 4-D mask. Planning runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from evomerge.evaluation.inference.attention_masks import Windows, attention_mask
from evomerge.evaluation.inference.prefix_tree import (
    FORWARD_COST,
    TokenTree,
    shared_prefixes,
    token_tree,
    visibility,
)
from evomerge.evaluation.inference.requests import Request, distinct

Optimization = Literal["plain", "prefix", "fork", "tree"]
OPTIMIZATIONS: tuple[Optimization, ...] = ("tree", "fork", "prefix", "plain")
"""From the one that shares most to the one that shares nothing."""
_Item = TypeVar("_Item")
_SHORTEST = 8  # tokens below which a context is not worth a cache of its own
_WORTHWHILE = 0.8  # of its rows' tokens: a tree that is no smaller is not worth its mask
_RAGGED = 16  # tokens by which the contexts of one batch of forks may differ


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs to know of a model.

    Attributes:
        dtype: Its floating-point type.
        device: Where its inputs go.
        windows: Limits of its attention.
        positions: Whether it takes `position_ids`.
        pad_id: Token id that rows are padded with.
        tokens: Most input tokens of one forward.
        rows: Most rows of logits of one forward.
        forward_cost: What one more forward costs, in tokens.
    """

    dtype: torch.dtype
    device: torch.device
    windows: Windows = field(default_factory=Windows)
    positions: bool = True
    pad_id: int = 0
    tokens: int = 2048
    rows: int = 4096
    forward_cost: int = FORWARD_COST


@dataclass(frozen=True, slots=True)
class Reads:
    """Which logits of a forward are read, for M scored tokens.

    Attributes:
        rows: [N] flat rows of the batch whose logits are computed.
        row: [M] index into `rows` of every scored token.
        target: [M] the token.
        request: [M] the index of its request.
    """

    rows: Tensor
    row: Tensor
    target: Tensor
    request: Tensor


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """One forward.

    Attributes:
        ids: [B, S] token ids.
        reads: What is read from its logits; None for nothing.
        source: Number of the cache that it continues; None for none.
        spread: Number of rows that the source's one row is spread to, if `index` is None.
        index: [B] rows of the source that the rows continue.
        keep: Number that its own cache is kept under; None to drop it.
        windowed: Whether a new cache has the model's own windows.
        positions: [B, S] logical positions; None if the model counts.
        mask: Attention mask; None for the model's own.
        drop: Numbers of the caches that no later step needs.
    """

    ids: Tensor
    reads: Reads | None = None
    source: int | None = None
    spread: int = 1
    index: Tensor | None = None
    keep: int | None = None
    windowed: bool = True
    positions: Tensor | None = None
    mask: Any = None
    drop: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoglikelihoodPlan:
    """Steps that score requests.

    Attributes:
        optimization: How computation is shared.
        steps: The forwards, in order.
        size: Number of distinct requests.
        places: Of every given request, its index among the distinct ones.
        tokens: Input tokens of all steps.
    """

    optimization: Optimization
    steps: tuple[ForwardStep, ...]
    size: int
    places: Tensor
    tokens: int


def make_plan(
    requests: Sequence[Request], optimization: Optimization, facts: ModelFacts
) -> LoglikelihoodPlan:
    """Plans the forwards that score requests.

    Args:
        requests: The requests; repeated ones are scored once.
        optimization: How computation is shared, where that saves tokens; elsewhere rows are plain.
        facts: What is known of the model.

    Returns:
        The plan.
    """
    unique, places = distinct(requests)
    planner = _Planner(unique, facts)
    plan_with = {
        "plain": planner.plain,
        "prefix": planner.prefix,
        "fork": planner.fork,
        "tree": planner.tree,
    }
    plan_with[optimization]()
    return LoglikelihoodPlan(
        optimization,
        _with_drops(planner.steps),
        len(unique),
        torch.tensor(places, dtype=torch.long),
        sum(step.ids.numel() for step in planner.steps),
    )


def _with_drops(steps: Sequence[ForwardStep]) -> tuple[ForwardStep, ...]:
    """The steps, each with the caches that it is the last to use."""
    last_use: dict[int, int] = {}
    for i, step in enumerate(steps):
        for number in (step.source, step.keep):
            if number is not None:
                last_use[number] = i
    return tuple(
        replace(step, drop=tuple(number for number, last in last_use.items() if last == i))
        for i, step in enumerate(steps)
    )


class _Planner:
    """Collects steps for distinct requests. Numbers of requests are indices into them."""

    def __init__(self, requests: Sequence[Request], facts: ModelFacts) -> None:
        self.requests, self.facts = requests, facts
        self.inputs = [request.inputs for request in requests]
        self.steps: list[ForwardStep] = []
        self._num_caches = 0

    def plain(self) -> None:
        self._add_rows(range(len(self.requests)))

    def prefix(self) -> None:
        for length, numbers in self._prefix_groups():
            self._add_rows(numbers, length, self._prefill(numbers, length))

    def fork(self) -> None:
        for length, numbers in self._prefix_groups():
            source = self._prefill(numbers, length)
            # the row of a context's last token is read: it goes with the choices
            by_context = self._by_context(numbers, length)
            plain: list[int] = []
            batch: list[tuple[tuple[int, ...], list[int]]] = []
            for context, choices in sorted(by_context.items(), key=lambda pair: len(pair[0])):
                if len(context) < _SHORTEST or len(_merged([self.inputs[i] for i in choices])) < 2:
                    plain += choices  # nothing to fork for
                    continue
                if batch and not self._fits_forks(batch, context):
                    self._add_forks(batch, length, source)
                    batch = []
                batch.append((context, choices))
            if batch:
                self._add_forks(batch, length, source)
            self._add_rows(plain, length, source)

    def tree(self) -> None:
        for length, numbers in self._prefix_groups():
            by_context = self._by_context(numbers, length, last_token=True)
            plain: list[int] = []
            trees: list[tuple[TokenTree, list[int]]] = []
            for context, choices in by_context.items():
                tree = self._worthwhile_tree(context, [self.inputs[i][length:] for i in choices])
                if tree is None:
                    plain += choices
                else:
                    trees.append((tree, choices))
            if trees:
                self._add_trees(trees, length, self._prefill(numbers, length, windowed=False))
            if plain:
                self._add_rows(plain, length, self._prefill(numbers, length))

    # ---- what shares ---------------------------------------------------------------------------------------

    def _by_context(
        self, numbers: Iterable[int], start: int, *, last_token: bool = False
    ) -> dict[tuple[int, ...], list[int]]:
        """Requests by their contexts from a position on, with or without the context's last token."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in numbers:
            end = self.requests[i].first + int(last_token)
            groups.setdefault(self.inputs[i][start:end], []).append(i)
        return groups

    def _prefix_groups(self) -> list[tuple[int, list[int]]]:
        """(length of the shared prefix, requests), 0 for those that share none.

        Every row that is read comes after it.
        """
        by_context = self._by_context(range(len(self.requests)), 0)
        contexts = list(by_context)
        groups, rest = shared_prefixes(contexts, self.facts.forward_cost)
        grouped = [
            (length, [i for c in members for i in by_context[contexts[c]]]) for length, members in groups
        ]
        alone = [i for c in rest for i in by_context[contexts[c]]]
        return [*grouped, (0, alone)] if alone else grouped

    def _fits_forks(
        self, batch: Sequence[tuple[tuple[int, ...], list[int]]], context: tuple[int, ...]
    ) -> bool:
        """Whether a context, no shorter than those of a batch, can join it."""
        ragged = len(context) - len(batch[0][0])
        return ragged <= _RAGGED and len(context) * (len(batch) + 1) <= self.facts.tokens

    def _worthwhile_tree(
        self, context: tuple[int, ...], sequences: Sequence[tuple[int, ...]]
    ) -> TokenTree | None:
        """The tree of sequences after one context; None where a mask costs more than it saves."""
        rows = _merged(sequences)
        if len(rows) < 2 or len(context) < _SHORTEST:
            return None
        tree = token_tree(sequences)
        most = min(float(self.facts.tokens), _WORTHWHILE * sum(len(row) for row, _ in rows))
        return tree if len(tree.tokens) <= most else None

    # ---- steps ---------------------------------------------------------------------------------------------

    def _prefill(self, numbers: Sequence[int], length: int, *, windowed: bool = True) -> int | None:
        """Number of the cache of a group's shared prefix; None for the empty one."""
        if not length:
            return None
        ids = torch.tensor([self.inputs[numbers[0]][:length]])
        return self._add(ForwardStep(ids, windowed=windowed), past=0, keep=True)

    def _add_rows(self, numbers: Sequence[int], past: int = 0, source: int | None = None) -> None:
        """Right-padded rows, sorted by length; inputs that begin another input are read from its row."""
        rows = sorted(_merged([self.inputs[i] for i in numbers]), key=lambda row: -len(row[0]))

        def length(row: tuple[tuple[int, ...], list[int]]) -> int:
            return len(row[0]) - past

        def reads(row: tuple[tuple[int, ...], list[int]]) -> int:
            return self._num_reads(numbers[i] for i in row[1])

        for batch in self._batches(rows, length, reads):
            ids = self._padded([row[past:] for row, _ in batch])
            starts = [
                (numbers[i], b * ids.shape[1] - past) for b, (_, members) in enumerate(batch) for i in members
            ]
            step = ForwardStep(ids, self._reads_of_rows(starts), source, len(batch))
            self._add(step, past=past)

    def _add_forks(
        self, batch: list[tuple[tuple[int, ...], list[int]]], past: int, source: int | None
    ) -> None:
        """Contexts cut at the shortest of the batch, then every choice on a fork of its context."""
        shortest = len(batch[0][0])
        ids = torch.tensor([context[:shortest] for context, _ in batch])
        contexts = self._add(ForwardStep(ids, source=source, spread=len(batch)), past=past, keep=True)
        rows: list[
            tuple[int, tuple[int, ...], list[int]]
        ] = []  # (row of the context, input, requests read from it)
        for b, (_, choices) in enumerate(batch):
            for row, members in _merged([self.inputs[i] for i in choices]):
                rows.append((b, row, [choices[i] for i in members]))
        rows.sort(key=lambda row: -len(row[1]))
        done = past + shortest
        for part in self._batches(rows, lambda row: len(row[1]) - done, lambda row: self._num_reads(row[2])):
            ids = self._padded([row[done:] for _, row, _ in part])
            starts = [
                (i, at * ids.shape[1] - done) for at, (_, _, members) in enumerate(part) for i in members
            ]
            index = torch.tensor([b for b, _, _ in part], device=self.facts.device)
            self._add(ForwardStep(ids, self._reads_of_rows(starts), contexts, index=index), past=done)

    def _add_trees(self, trees: Sequence[tuple[TokenTree, list[int]]], past: int, source: int | None) -> None:
        """Trees, the largest first, each a row under an explicit mask."""
        ordered = sorted(trees, key=lambda pair: -len(pair[0].tokens))
        for batch in self._batches(
            ordered, lambda pair: len(pair[0].tokens), lambda pair: self._num_reads(pair[1])
        ):
            width = len(batch[0][0].tokens)
            rows: list[tuple[int, list[int]]] = []
            for b, (tree, members) in enumerate(batch):
                for path, i in zip(tree.paths, members, strict=True):
                    first = self.requests[i].first - past
                    nodes = path[first : first + len(self.requests[i].continuation)]
                    rows.append((i, [b * width + node for node in nodes]))
            seen, queries, keys = visibility([tree for tree, _ in batch], past, width)
            step = ForwardStep(
                self._padded([tree.tokens for tree, _ in batch]),
                self._reads(rows),
                source,
                len(batch),
                windowed=False,
                positions=queries,
                mask=attention_mask(self.facts.windows, seen, queries, keys, self.facts.dtype),
            )
            self._add(step, past=past)

    def _add(self, step: ForwardStep, *, past: int, keep: bool = False) -> int | None:
        """Adds a step after `past` tokens: on the model's device, with positions where a cache needs them.

        Returns the number that its cache is kept under.
        """
        number = None
        if keep:
            number, self._num_caches = self._num_caches, self._num_caches + 1
        device = self.facts.device
        positions = step.positions
        if positions is None and (step.source is not None or keep):
            positions = torch.arange(past, past + step.ids.shape[1]).expand(step.ids.shape[0], -1)
        mask = step.mask
        if isinstance(mask, dict):
            mask = {kind: m.to(device) for kind, m in mask.items()}
        elif mask is not None:
            mask = mask.to(device)
        self.steps.append(
            replace(
                step,
                ids=step.ids.to(device),
                keep=number,
                positions=positions.to(device) if positions is not None and self.facts.positions else None,
                mask=mask,
            )
        )
        return number

    # ---- reads and batches ---------------------------------------------------------------------------------

    def _reads_of_rows(self, starts: Sequence[tuple[int, int]]) -> Reads:
        """Reads of (request, flat row of its input's position 0) pairs whose rows follow one another."""
        rows = []
        for i, start in starts:
            first = start + self.requests[i].first
            rows.append((i, list(range(first, first + len(self.requests[i].continuation)))))
        return self._reads(rows)

    def _reads(self, rows_by_request: Sequence[tuple[int, list[int]]]) -> Reads:
        """Reads of (request, flat rows of its continuation's tokens) pairs."""
        rows = [row for _, own_rows in rows_by_request for row in own_rows]
        unique = sorted(set(rows))
        place = {row: at for at, row in enumerate(unique)}

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.facts.device)

        return Reads(
            rows=tensor(unique),
            row=tensor([place[row] for row in rows]),
            target=tensor([token for i, _ in rows_by_request for token in self.requests[i].continuation]),
            request=tensor([i for i, own_rows in rows_by_request for _ in own_rows]),
        )

    def _num_reads(self, numbers: Iterable[int]) -> int:
        """Rows of logits that requests read."""
        return sum(len(self.requests[i].continuation) for i in numbers)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, S] rows padded on the right."""
        ids = torch.full((len(rows), max(len(row) for row in rows)), self.facts.pad_id)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.tensor(row)
        return ids

    def _batches(
        self, items: Sequence[_Item], length: Callable[[_Item], int], reads: Callable[[_Item], int]
    ) -> Iterator[list[_Item]]:
        """Runs of items that one forward takes: bounded in padded tokens and rows read; at least one item."""
        batch: list[_Item] = []
        longest = rows = 0
        for item in items:
            longest, more = max(longest, length(item)), reads(item)
            if batch and (longest * (len(batch) + 1) > self.facts.tokens or rows + more > self.facts.rows):
                yield batch
                batch, longest, rows = [], length(item), 0
            batch.append(item)
            rows += more
        if batch:
            yield batch


def _merged(inputs: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """(input, indices of the inputs that it is or that begin it) of every input that begins no other."""
    rows: list[tuple[tuple[int, ...], list[int]]] = []
    for i in sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True):
        if rows and rows[-1][0][: len(inputs[i])] == inputs[i]:
            rows[-1][1].append(i)
        else:
            rows.append((inputs[i], [i]))
    return rows
