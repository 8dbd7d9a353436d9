"""Requests -> the forwards that answer them, as tensors: made once, replayed for every candidate. Runs no model.

Four techniques, each sharing more than the one before: plain right-padded rows; a prefix common to many contexts computed
once; then also each context once, its choices as forks of its cache; or its choices as one token tree under a 4-D mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from evomerge.evaluation.inference.attention_masks import Windows, attention_mask
from evomerge.evaluation.inference.prefix_tree import LAUNCH, Tree, shared_prefixes, tree, visible
from evomerge.evaluation.inference.requests import Request, distinct

Optimization = Literal["plain", "prefix", "fork", "tree"]
OPTIMIZATIONS: tuple[Optimization, ...] = ("tree", "fork", "prefix", "plain")
"""From the one that shares most down."""
_Item = TypeVar("_Item")
_LEAST = 8  # tokens below which a context is not worth a cache of its own
_WORTH = 0.8  # of its rows' tokens: a tree that is no smaller is not worth its mask
_RAGGED = 16  # tokens by which the contexts of one batch of forks may differ


@dataclass(frozen=True, slots=True)
class Facts:
    """What planning knows of a model. tokens, rows: most input tokens and most logits rows of one forward.

    positions: whether it takes `position_ids`; launch: what a forward costs more, in tokens.
    """

    dtype: torch.dtype
    device: torch.device
    windows: Windows = field(default_factory=Windows)
    positions: bool = True
    pad_id: int = 0
    tokens: int = 2048
    rows: int = 4096
    launch: int = LAUNCH


@dataclass(frozen=True, slots=True)
class Reads:
    """rows [N]: flat rows of the batch whose logits are read; row, target, request [M]: of every token scored, its place
    in `rows`, the token, and the number of its request."""

    rows: Tensor
    row: Tensor
    target: Tensor
    request: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One forward. ids [B, S]; source: number of the cache it goes on from, spread to `spread` rows or to those in `index`.

    keep: number its own cache is kept under; windowed: a new cache has the model's own windows; drop: caches that no later
    step needs.
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
class Plan:
    """Steps that score `size` distinct requests. places: of every request asked, its number among them; tokens: inputs in all."""

    technique: Optimization
    steps: tuple[Step, ...]
    size: int
    places: Tensor
    tokens: int


def make(requests: Sequence[Request], technique: Optimization, facts: Facts) -> Plan:
    """The plan of one technique; a technique shares where that saves tokens, and falls back to plain rows elsewhere."""
    asked, places = distinct(requests)
    planner = _Planner(asked, facts)
    getattr(planner, technique)()
    steps = _dropped(planner.steps)
    return Plan(
        technique,
        steps,
        len(asked),
        torch.tensor(places, dtype=torch.long),
        sum(step.ids.numel() for step in steps),
    )


def _dropped(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, each with the caches that it is the last to use."""
    last = {
        number: at
        for at, step in enumerate(steps)
        for number in (step.source, step.keep)
        if number is not None
    }
    return tuple(
        replace(step, drop=tuple(n for n, end in last.items() if end == at)) for at, step in enumerate(steps)
    )


class _Planner:
    """Collects steps for distinct requests; numbers below are indices into them."""

    def __init__(self, requests: Sequence[Request], facts: Facts) -> None:
        self.requests, self.facts = requests, facts
        self.inputs = [request.inputs for request in requests]
        self.steps: list[Step] = []
        self._caches = 0

    def plain(self) -> None:
        self._rows(range(len(self.requests)))

    def prefix(self) -> None:
        for length, numbers in self._split():
            self._rows(numbers, length, self._prefill(numbers, length))

    def fork(self) -> None:
        for length, numbers in self._split():
            source = self._prefill(numbers, length)
            by_context: dict[tuple[int, ...], list[int]] = {}
            for i in numbers:  # the row of a context's last token is read: it goes with the choices
                by_context.setdefault(self.inputs[i][length : self.requests[i].first], []).append(i)
            alone: list[int] = []
            batch: list[tuple[tuple[int, ...], list[int]]] = []
            for context, choices in sorted(by_context.items(), key=lambda pair: len(pair[0])):
                if len(context) < _LEAST or len(_merged([self.inputs[i] for i in choices])) < 2:
                    alone += choices  # nothing to fork for
                    continue
                if batch and (
                    len(context) - len(batch[0][0]) > _RAGGED
                    or len(context) * (len(batch) + 1) > self.facts.tokens
                ):
                    self._forks(batch, length, source)
                    batch = []
                batch.append((context, choices))
            if batch:
                self._forks(batch, length, source)
            self._rows(alone, length, source)

    def tree(self) -> None:
        for length, numbers in self._split():
            by_context: dict[tuple[int, ...], list[int]] = {}
            for i in numbers:
                by_context.setdefault(self.inputs[i][length : self.requests[i].first + 1], []).append(i)
            alone: list[int] = []
            grown: list[tuple[Tree, list[int]]] = []
            for context, choices in by_context.items():
                rows = _merged([self.inputs[i][length:] for i in choices])
                t = (
                    tree([self.inputs[i][length:] for i in choices])
                    if len(rows) > 1 and len(context) >= _LEAST
                    else None
                )
                if (
                    t is None
                    or len(t.tokens) > self.facts.tokens
                    or len(t.tokens) > _WORTH * sum(len(row) for row, _ in rows)
                ):
                    alone += choices  # a mask costs more than it saves
                else:
                    grown.append((t, choices))
            if grown:
                self._trees(grown, length, self._prefill(numbers, length, windowed=False))
            if alone:
                self._rows(alone, length, self._prefill(numbers, length))

    # ---- the pieces ----------------------------------------------------------------------------------------------------

    def _split(self) -> list[tuple[int, list[int]]]:
        """(length of the shared prefix, requests) by group; 0 for those that share none. Every row that is read comes after it."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(self.requests):
            by_context.setdefault(self.inputs[i][: request.first], []).append(i)
        contexts = list(by_context)
        groups, left = shared_prefixes(contexts, self.facts.launch)
        found = [
            (length, [i for c in members for i in by_context[contexts[c]]]) for length, members in groups
        ]
        rest = [i for c in left for i in by_context[contexts[c]]]
        return [*found, (0, rest)] if rest else found

    def _prefill(self, numbers: Sequence[int], length: int, *, windowed: bool = True) -> int | None:
        """Number of the cache of a group's shared prefix; None for the empty one."""
        if not length:
            return None
        ids = torch.tensor([self.inputs[numbers[0]][:length]])
        return self._add(ids, past=0, keep=True, windowed=windowed)

    def _rows(self, numbers: Sequence[int], past: int = 0, source: int | None = None) -> None:
        """Right-padded rows, sorted by length; inputs that begin another input are read from its row."""
        rows = sorted(_merged([self.inputs[i] for i in numbers]), key=lambda row: -len(row[0]))
        for batch in self._batches(
            rows, lambda row: len(row[0]) - past, lambda row: self._count(numbers[i] for i in row[1])
        ):
            ids = self._padded([row[past:] for row, _ in batch])
            reads = [(numbers[i], b * ids.shape[1] - past) for b, (_, own) in enumerate(batch) for i in own]
            self._add(ids, past=past, source=source, spread=len(batch), reads=self._reads(reads))

    def _forks(self, batch: list[tuple[tuple[int, ...], list[int]]], past: int, source: int | None) -> None:
        """Contexts cut at the shortest of the batch, then every choice on a fork of its context."""
        cut = len(batch[0][0])
        ids = torch.tensor([context[:cut] for context, _ in batch])
        kept = self._add(ids, past=past, source=source, spread=len(batch), keep=True)
        rows: list[
            tuple[int, tuple[int, ...], list[int]]
        ] = []  # (row of the context, input, requests read from it)
        for b, (_, choices) in enumerate(batch):
            rows += [
                (b, row, [choices[i] for i in own]) for row, own in _merged([self.inputs[i] for i in choices])
            ]
        rows.sort(key=lambda row: -len(row[1]))
        done = past + cut
        for part in self._batches(rows, lambda row: len(row[1]) - done, lambda row: self._count(row[2])):
            ids = self._padded([row[done:] for _, row, _ in part])
            reads = [(i, at * ids.shape[1] - done) for at, (_, _, own) in enumerate(part) for i in own]
            index = torch.tensor([b for b, _, _ in part], device=self.facts.device)
            self._add(ids, past=done, source=kept, index=index, reads=self._reads(reads))

    def _trees(self, trees: Sequence[tuple[Tree, list[int]]], past: int, source: int | None) -> None:
        ordered = sorted(trees, key=lambda pair: -len(pair[0].tokens))
        for batch in self._batches(ordered, lambda t: len(t[0].tokens), lambda t: self._count(t[1])):
            width = len(batch[0][0].tokens)
            ids = self._padded([t.tokens for t, _ in batch])
            reads: list[tuple[int, list[int]]] = []
            for b, (t, own) in enumerate(batch):
                for path, i in zip(t.paths, own, strict=True):
                    first = self.requests[i].first - past
                    reads.append(
                        (
                            i,
                            [
                                b * width + node
                                for node in path[first : first + len(self.requests[i].continuation)]
                            ],
                        )
                    )
            seen, queries, keys = visible([t for t, _ in batch], past, width)
            mask = attention_mask(self.facts.windows, seen, queries, keys, self.facts.dtype)
            self._add(
                ids,
                past=past,
                source=source,
                spread=len(batch),
                reads=self._read(reads),
                mask=mask,
                positions=queries,
                windowed=False,
            )

    def _add(
        self,
        ids: Tensor,
        *,
        past: int,
        source: int | None = None,
        spread: int = 1,
        index: Tensor | None = None,
        keep: bool = False,
        windowed: bool = True,
        reads: Reads | None = None,
        mask: Any = None,
        positions: Tensor | None = None,
    ) -> int | None:
        number = None
        if keep:
            number, self._caches = self._caches, self._caches + 1
        device = self.facts.device
        if positions is None and (source is not None or keep) and self.facts.positions:
            positions = torch.arange(past, past + ids.shape[1]).expand(ids.shape[0], -1)
        self.steps.append(
            Step(
                ids.to(device),
                reads,
                source,
                spread,
                index,
                number,
                windowed,
                positions.to(device) if positions is not None and self.facts.positions else None,
                {kind: m.to(device) for kind, m in mask.items()}
                if isinstance(mask, dict)
                else mask
                if mask is None
                else mask.to(device),
            )
        )
        return number

    def _reads(self, starts: Sequence[tuple[int, int]]) -> Reads:
        """(request, flat row of its input's position 0) pairs whose rows follow one another."""
        found = []
        for i, start in starts:
            first = start + self.requests[i].first
            found.append((i, list(range(first, first + len(self.requests[i].continuation)))))
        return self._read(found)

    def _read(self, found: Sequence[tuple[int, list[int]]]) -> Reads:
        rows = [row for _, own in found for row in own]
        unique = sorted(set(rows))
        place = {row: at for at, row in enumerate(unique)}
        columns = (
            unique,
            [place[row] for row in rows],
            [token for i, _ in found for token in self.requests[i].continuation],
            [i for i, own in found for _ in own],
        )
        return Reads(
            *(torch.tensor(column, dtype=torch.long, device=self.facts.device) for column in columns)
        )

    def _count(self, numbers: Iterable[int]) -> int:
        """Rows that requests read."""
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
        """Runs of items that one forward takes: bounded in padded tokens and in rows read; at least one item."""
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
