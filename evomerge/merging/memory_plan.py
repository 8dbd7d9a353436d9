"""Where the models of a search lie: on a card, over several, or streamed from the host. Sizes in, plan out.

Pure functions of sizes; nothing is allocated and no device is asked. A plan is of all cards of one worker;
the workers of one card share its parents. In order of preference everything lies on the cards, each with a
run of layers; else some layers of some parents are copied from pinned memory for each candidate; else the
plan is refused, with the numbers. The first card has the tensors outside the stack and computes the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from evomerge.checkpoints import Parent
from evomerge.errors import SetupError
from evomerge.merging.layer_split import split_layers

RESERVE = 2_000_000_000
"""Bytes of each card, for each worker, that are not planned: CUDA's context, libraries, fragments."""
BUFFERS = 2  # pieces of a streamed parent that are on a card at a time
_MOST_CARDS = 64  # of one worker that are tried


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes of a model.

    Attributes:
        outer: Of the tensors outside the decoder stack.
        layers: Of each layer.
    """

    outer: int
    layers: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return self.outer + sum(self.layers)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Bytes of each piece: the layers, then the tensors outside."""
        return (*self.layers, self.outer)


def parent_size(parent: Parent, item_bytes: int | None = None) -> ModelSize:
    """The size of a parent, by layer; only its headers are used.

    Args:
        parent: The parent.
        item_bytes: Bytes of an element; None for the type that each tensor is stored in.

    Returns:
        The size.
    """
    outer, layers = 0, [0] * parent.layout.num_layers
    for name, info in parent.tensors.items():
        layer = parent.layout.place(name).layer
        size = info.nbytes if item_bytes is None else prod(info.shape) * item_bytes
        if layer is None:
            outer += size
        else:
            layers[layer] += size
    return ModelSize(outer, tuple(layers))


@dataclass(frozen=True, slots=True)
class ScoringSize:
    """Bytes that scoring takes of the cards of a worker, at least.

    Attributes:
        activations: On each card.
        logits: On the first card.
        kv_of_layer: Keys and values of each layer, on its card.
        engine: Of a text engine, on the first card.
    """

    activations: int = 0
    logits: int = 0
    kv_of_layer: int = 0
    engine: int = 0


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What a search needs of memory.

    Attributes:
        parents: Name -> bytes as stored, the base first; the last are the first to be streamed.
        live: Of the model that merges are written into, in the type that is scored.
        live_models: How many such models a worker has: routes have the parents beside the merge.
        scoring: What scoring takes at least.
        tables: Bytes of tables of magnitudes; they lie on the first card.
        ranks: Of the rank tables of all parents; what does not fit is computed for each candidate.
        workers: That share each card.
    """

    parents: Mapping[str, ModelSize]
    live: ModelSize
    live_models: int = 1
    scoring: ScoringSize = field(default_factory=ScoringSize)
    tables: int = 0
    ranks: int = 0
    workers: int = 1

    @property
    def models(self) -> int:
        """Bytes of the parents and the live models of all workers of a card."""
        return (
            sum(size.total for size in self.parents.values())
            + self.live.total * self.live_models * self.workers
        )


@dataclass(frozen=True, slots=True)
class CardPlan:
    """What lies on one card, in bytes.

    Attributes:
        size: Bytes of the card that may be planned with.
        layers: The decoder layers that lie there.
        live: Models that merges are written into.
        parents: Parents that lie there.
        streamed: Parent -> bytes of its pieces that are copied for each candidate.
        buffers: For those copies.
        tables: Tables of magnitudes.
        scoring: What scoring takes at least.
        reserve: Not planned.
    """

    size: int
    layers: range
    live: int
    parents: int
    streamed: Mapping[str, int]
    buffers: int
    tables: int
    scoring: int
    reserve: int

    @property
    def taken(self) -> int:
        """Bytes that are spoken for."""
        return self.live + self.parents + self.buffers + self.tables + self.scoring + self.reserve

    @property
    def left(self) -> int:
        """Bytes that are left; negative where it does not fit."""
        return self.size - self.taken


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where everything of a worker lies.

    Attributes:
        cards: One for each card.
        streamed: Parent -> pieces that are streamed: layers, and None for the tensors outside the stack.
        ranks: Bytes that rank tables may take, of those requested.
        ranks_requested: Bytes that they would take.
    """

    cards: tuple[CardPlan, ...]
    streamed: Mapping[str, frozenset[int | None]]
    ranks: int
    ranks_requested: int

    @property
    def pinned(self) -> int:
        """Bytes of pinned host memory."""
        return sum(sum(card.streamed.values()) for card in self.cards)

    @property
    def left(self) -> int:
        """Bytes that are left on the fullest card, without rank tables."""
        return min(card.left for card in self.cards)

    def card_of(self, layer: int | None) -> int:
        """Index of the card where a layer lies, as do all parents' layers of that index.

        Args:
            layer: Index in the stack; None for what is outside it.

        Returns:
            The card's index in `cards`; the last one's for a layer that the base lacks.
        """
        if layer is None:
            return 0
        return next((i for i, card in enumerate(self.cards) if layer in card.layers), len(self.cards) - 1)

    def is_streamed(self, parent: str, layer: int | None) -> bool:
        """Whether a piece of a parent is copied from pinned memory for each candidate.

        Args:
            parent: Name of the parent.
            layer: Index in the stack; None for what is outside it.

        Returns:
            True if it is.
        """
        return layer in self.streamed.get(parent, ())


def plan_memory(request: MemoryRequest, cards: Sequence[int], host: int) -> MemoryPlan:
    """Plans the memory of a worker.

    Args:
        request: What is needed.
        cards: Bytes of each card that may be planned with, the worker's first card first.
        host: Bytes of host memory that may be pinned.

    Returns:
        The plan.

    Raises:
        SetupError: Where it does not fit even with every parent streamed; says what was needed, what there is
            and what to change.
    """
    plan = _resident(request, cards)
    if plan is None:
        plan = _streaming(request, cards)
    if plan is None or plan.pinned > host:
        raise SetupError(_refusal(request, cards, host, plan))
    return plan


def fewest_cards(request: MemoryRequest, card: int, most: int = _MOST_CARDS) -> int | None:
    """How many equal cards hold everything without streaming.

    Args:
        request: What is needed.
        card: Bytes of each.
        most: How many are tried.

    Returns:
        The number; None where so many do not.
    """
    if card <= RESERVE * request.workers:
        return None
    most = min(most, max(1, len(request.live.layers)))
    least = max(1, -(-request.models // card))
    return next((n for n in range(least, most + 1) if _resident(request, [card] * n) is not None), None)


def _resident(request: MemoryRequest, cards: Sequence[int]) -> MemoryPlan | None:
    """Everything on the cards; None where it does not fit."""
    loads = _loads(request)
    capacities = [size - _fixed(request, i) for i, size in enumerate(cards)]
    runs = split_layers(loads, capacities)
    planned = tuple(_card(request, i, size, runs[i]) for i, size in enumerate(cards))
    return _plan(request, planned, {}) if all(card.left >= 0 for card in planned) else None


def _streaming(request: MemoryRequest, cards: Sequence[int]) -> MemoryPlan | None:
    """As much as must be copied for each candidate; None where that is not enough."""
    pieces = max(max(size.pieces) for size in request.parents.values())
    capacities = [size - _fixed(request, i) - BUFFERS * pieces for i, size in enumerate(cards)]
    runs = split_layers(_loads(request), capacities)
    streamed: dict[str, set[int | None]] = {}
    planned = []
    for i, size in enumerate(cards):
        card = _card(request, i, size, runs[i])
        for name, layer in _streamable(request, runs[i], is_first=i == 0):
            if card.left >= 0:
                break
            card = _without(card, name, _piece(request.parents[name], layer))
            streamed.setdefault(name, set()).add(layer)
        if card.left < 0:
            return None
        planned.append(card)
    return _plan(request, tuple(planned), streamed)


def _streamable(request: MemoryRequest, layers: range, *, is_first: bool) -> list[tuple[str, int | None]]:
    """The pieces of parents on a card, in the order in which they are streamed: the base's last."""
    own: list[int | None] = [*layers, *([None] if is_first else [])]
    return [
        (name, layer)
        for name in reversed(list(request.parents))
        for layer in own
        if _piece(request.parents[name], layer)
    ]


def _without(card: CardPlan, name: str, size: int) -> CardPlan:
    """The card with a piece of a parent streamed."""
    streamed = dict(card.streamed)
    streamed[name] = streamed.get(name, 0) + size
    return replace(
        card,
        parents=card.parents - size,
        streamed=streamed,
        buffers=max(card.buffers, BUFFERS * size),
    )


def _plan(
    request: MemoryRequest, cards: tuple[CardPlan, ...], streamed: Mapping[str, set[int | None]]
) -> MemoryPlan:
    room = len(cards) * min(card.left for card in cards)  # ranks lie beside their layers
    return MemoryPlan(
        cards,
        {name: frozenset(pieces) for name, pieces in streamed.items()},
        min(request.ranks, room),
        request.ranks,
    )


def _card(request: MemoryRequest, index: int, size: int, layers: range) -> CardPlan:
    """What a card would hold with nothing streamed."""
    own: list[int | None] = [*layers, *([None] if index == 0 else [])]
    live = sum(_piece(request.live, layer) for layer in own) * request.live_models * request.workers
    scoring = request.scoring.activations + request.scoring.kv_of_layer * len(layers)
    if index == 0:
        scoring += request.scoring.logits + request.scoring.engine
    return CardPlan(
        size,
        layers,
        live,
        sum(_piece(parent, layer) for parent in request.parents.values() for layer in own),
        {},
        0,
        request.tables if index == 0 else 0,
        scoring * request.workers,
        RESERVE * request.workers,
    )


def _fixed(request: MemoryRequest, index: int) -> int:
    """Bytes of a card that do not depend on its layers."""
    return _card(request, index, 0, range(0)).taken


def _loads(request: MemoryRequest) -> list[int]:
    """Bytes of each layer of everything."""
    return [
        sum(_piece(parent, i) for parent in request.parents.values())
        + size * request.live_models * request.workers
        + request.scoring.kv_of_layer * request.workers
        for i, size in enumerate(request.live.layers)
    ]


def _piece(size: ModelSize, layer: int | None) -> int:
    if layer is None:
        return size.outer
    return size.layers[layer] if layer < len(size.layers) else 0


# ---- text --------------------------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """A size to be read.

    Args:
        size: Bytes.

    Returns:
        Such as '15.2 GB', of 10⁹ bytes each.
    """
    return f"{size / 1e9:.1f} GB"


def describe(plan: MemoryPlan) -> list[str]:
    """A plan in lines for the terminal: one for each card, for what is streamed, and for rank tables.

    Args:
        plan: The plan.

    Returns:
        The lines.
    """
    lines = [_card_line(i, card, len(plan.cards)) for i, card in enumerate(plan.cards)]
    for name, pieces in plan.streamed.items():
        layers = len(pieces - {None})
        what = [f"{layers} layers"] if layers else []
        what += ["the tensors outside the stack"] if None in pieces else []
        size = sum(card.streamed.get(name, 0) for card in plan.cards)
        lines.append(
            f"{name}: {' and '.join(what)} streamed from pinned memory, {gigabytes(size)} for each candidate"
        )
    if plan.ranks < plan.ranks_requested:
        lines.append(
            f"rank tables: {gigabytes(plan.ranks)} of {gigabytes(plan.ranks_requested)} are kept, "
            "the others computed for each candidate"
        )
    return lines


def _card_line(index: int, card: CardPlan, cards: int) -> str:
    layers = f", layers {card.layers.start} to {card.layers.stop - 1}" if len(card.layers) else ", no layers"
    parts = [
        ("live", card.live),
        ("parents", card.parents),
        ("buffers", card.buffers),
        ("scoring", card.scoring),
        ("reserve", card.reserve),
    ]
    taken = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size)
    where = f"card {index}{layers}" if cards > 1 else "card"
    return f"{where}: {taken} of {gigabytes(card.size)}, {gigabytes(card.left)} left"


def _refusal(request: MemoryRequest, cards: Sequence[int], host: int, plan: MemoryPlan | None) -> str:
    """Why there is no plan: what was needed, what there is, what to change."""
    names, scoring, reserve = len(request.parents), 0, 0
    for i in range(len(cards)):
        card = _card(request, i, 0, range(0))
        scoring, reserve = scoring + card.scoring, reserve + card.reserve
    scoring += request.scoring.kv_of_layer * len(request.live.layers) * request.workers
    live = request.live.total * request.live_models * request.workers
    parents = sum(size.total for size in request.parents.values())
    needed = live + parents + scoring + reserve
    there = f"{len(cards)} {'card has' if len(cards) == 1 else 'cards have'} {gigabytes(sum(cards))}"
    text = (
        f"the models do not fit: {names} parents {gigabytes(parents)}, live models {gigabytes(live)}, "
        f"scoring {gigabytes(scoring)} and a reserve of {gigabytes(reserve)} are {gigabytes(needed)}; {there}"
    )
    if plan is None:
        text += ", too little for the live models, scoring and a layer of each parent"
    else:
        text += (
            f", and {gigabytes(plan.pinned)} would be streamed from pinned memory, of which "
            f"{gigabytes(host)} can be had"
        )
    enough = fewest_cards(request, min(cards)) if cards else None
    changes = [f"take cluster.gpus: {enough} of such cards"] if enough and enough > len(cards) else []
    changes += ["fewer workers a card"] if request.workers > 1 else []
    changes += ["fewer parents" if enough else "larger cards or fewer parents"]
    return f"{text}; {', or '.join(changes)}"
