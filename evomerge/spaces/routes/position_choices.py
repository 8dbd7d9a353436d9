"""Routes by changes of one model's path: at each layer to keep, skip, replace, or insert after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.base import finite_genes
from evomerge.spaces.routes.layer_pool import SIGMA, Gene, LayerPool, LayerRef, Scales, mutation_probability

_KEEP_UTILITY = 0.75
"""Utility of keeping a layer where a categorical gene chose otherwise: a repair first keeps such layers.
The choice that was made has utility 1, the others 0."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a position of the path may contribute to a route.

    Attributes:
        layers: The layers that it puts on the route, in order; empty where the layer is skipped.
        name: In words.
    """

    layers: tuple[LayerRef, ...]
    name: str


def position_choices(pool: LayerPool, spans: Sequence[int], position: int) -> tuple[Choice, ...]:
    """The choices at a position of the path of `pool.begin`.

    Args:
        pool: The layers of a route.
        spans: Lengths of the inserted spans, each of which ends at the position; a span that would begin
            below layer 0 is left out.
        position: Layer of the path, in [0, pool.depth).

    Returns:
        Keep, skip, another model's layer in its place, keep and insert a span after it; choices that put the
        same layers on the route are one.
    """
    kept: LayerRef = (pool.begin, position)
    names: dict[tuple[LayerRef, ...], str] = {(kept,): f"keep layer {position}", (): f"skip layer {position}"}
    matching = {name: _matching_layer(position, pool.depth, depth) for name, depth in pool.models}
    for name, layer in matching.items():
        names.setdefault(((name, layer),), f"layer {layer} of {name} in place of layer {position}")
    for name, last in matching.items():
        for length in spans:
            first = last - length + 1
            if first < 0:
                continue
            span = tuple((name, layer) for layer in range(first, last + 1))
            what = f"layers {first}-{last}" if length > 1 else f"layer {last}"
            names.setdefault((kept, *span), f"{what} of {name} after layer {position}")
    return tuple(Choice(layers, name) for layers, name in names.items())


@dataclass(frozen=True)
class PositionChoiceSpace:
    """At each position of the path of `pool.begin`, a choice: keep, skip, replace, or keep and insert.

    A position keeps its layer, skips it, takes another model's layer in its place, or keeps it and inserts a
    span
    of layers of any model after it. In a model of another depth d, position p of D stands for layer p (d - 1)
    / (D - 1), rounded.

    Genes: of each position, one for each choice but keep, and the choice of the largest gene above 0 is made,
    else keep; categorical: one whole number, the choice, in [0, categories). Then the scales. A route outside
    the bounds is repaired: as often as needed, the position changes its choice that loses the least by it
    (the difference of the two genes, keep being 0; in categorical genes what was not kept is kept first), the
    earlier one of equals.

    Example:
        space = PositionChoiceSpace(LayerPool((("math", 32), ("code", 32)), "math"), categorical=True)

    Attributes:
        pool: The layers of a route.
        scales: 'hop' has a log scale for each position: of the hidden state that enters the first of the
            position's layers, not those inserted after it. Of a skipped position it does nothing, and before
            a route's first layer it is 1. 'none' has no scales.
        expected_mutations: How many positions change in a first sample with the standard deviation `sigma`,
            before the bounds; at most `MAX_MUTATED_SHARE` of all.
        spans: Lengths of the inserted spans, at least 1, each of which ends at the position.
        categorical: Whether a position has one whole number instead of a gene for each choice.
        outer: Whether the model that gives embeddings and head is a choice too, the first; else it is
            `pool.begin`.

    References:
        SMM-Bench, arXiv:2509.02555, here with insertions.
    """

    pool: LayerPool
    scales: Scales = "hop"
    expected_mutations: float = 2.0
    spans: tuple[int, ...] = (1, 2)
    categorical: bool = False
    outer: bool = False

    def __post_init__(self) -> None:
        if self.scales == "matrix":
            raise ConfigError(
                "scales between any two layers belong to an indicator genome; ask for scales of hops, or none"
            )
        if any(length < 1 for length in self.spans):
            raise ConfigError(f"the length of an inserted span is at least 1, got {list(self.spans)}")
        least, depth = self.pool.bounds[0], self.pool.depth
        if least > depth and (1 not in self.spans or least > 2 * depth):
            raise ConfigError(
                f"a route of at least {least} layers by changes of single positions: the least must be "
                f"at most twice the {depth} layers of {self.pool.begin}, and spans must hold 1"
            )
        mutation_probability(self.expected_mutations, depth)

    @property
    def sigma(self) -> float:
        """First standard deviation of the optimizer that the genes are made for."""
        return SIGMA

    @property
    def keep_probability(self) -> float:
        """Probability that a first sample keeps the layer of a position."""
        return 1 - mutation_probability(self.expected_mutations, self.pool.depth)

    @cached_property
    def categories(self) -> tuple[int, ...]:
        """Number of choices of each categorical gene, the first genes; empty for a continuous genome."""
        if not self.categorical:
            return ()
        outer = [len(self._outer_models)] if len(self._outer_models) > 1 else []
        return (*outer, *(len(choices) for choices in self._choices))

    @cached_property
    def axes(self) -> tuple[Gene, ...]:
        """One for each gene: embeddings and head, the positions, the scales."""
        names: list[str] = []
        if self.categorical:
            if len(self._outer_models) > 1:
                names.append("embeddings and head")
            names += [f"choice at layer {position}" for position in range(self.pool.depth)]
        else:
            names += [f"embeddings and head of {name}" for name in self._outer_models[1:]]
            names += [choice.name for choices in self._choices for choice in choices[1:]]
        if self.scales == "hop":
            names += [f"scale before layer {position}" for position in range(self.pool.depth)]
        return tuple(Gene(name) for name in names)

    @property
    def category_weights(self) -> tuple[tuple[float, ...], ...]:
        """Relative weights of the choices of each categorical gene; empty for a continuous genome.

        Another model's layer in place of a position's is drawn as often as skip, keep and insertions
        together; models for embeddings and head are drawn alike.
        """
        if not self.categorical:
            return ()
        weights: list[tuple[float, ...]] = []
        if len(self._outer_models) > 1:
            weights.append((1.0,) * len(self._outer_models))
        for choices in self._choices:
            kinds = [_kind(number, choice) for number, choice in enumerate(choices)]
            weights.append(tuple(_KIND_WEIGHTS[kind] / kinds.count(kind) for kind in kinds))
        return tuple(weights)

    @property
    def start(self) -> tuple[float, ...]:
        """Every layer kept, all scales 1."""
        depth = self.pool.depth
        return self._genome(0, [0] * depth, [0.0] * depth)

    def choices(self, position: int) -> tuple[tuple[LayerRef, ...], ...]:
        """The layers that each choice at a position puts on the route: the first keeps, the second skips.

        Args:
            position: Layer of the path, in [0, pool.depth).

        Returns:
            Choice -> its layers.
        """
        return tuple(choice.layers for choice in self._choices[position])

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`.

        Args:
            genome: [len(axes)] genes.

        Returns:
            The recipe.

        Raises:
            ValueError: Also for a choice that does not exist.
        """
        genes = finite_genes(genome, len(self.axes))
        outer, rest = self._split_outer(genes)
        utilities = self._utilities(rest)
        chosen = self._repaired([values.index(max(values)) for values in utilities], utilities)
        depth = self.pool.depth
        layers: list[LayerRef] = []
        scales: list[float] = []
        for position, added in enumerate(self._chosen_layers(chosen)):
            if not added:
                continue
            layers += added
            first_scale = self.pool.scale(genes[position - depth]) if self.scales == "hop" else 1.0
            scales += [first_scale, *[1.0] * (len(added) - 1)]
        return self.pool.recipe(layers, scales, self._outer_models[outer])

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """A genome of a route, with the fewest positions changed.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes; None for a recipe that no genome gives.
        """
        outer = recipe.embeddings.sources[0][0]
        if outer not in self._outer_models:
            return None
        route = self.pool.route(recipe, outer)
        chosen = self._parsed(route.layers) if route is not None else None
        if route is None or chosen is None:
            return None
        scale_genes: list[float] = []
        next_layer = 0
        for added in self._chosen_layers(chosen):
            gene = self.pool.scale_gene(route.scales[next_layer]) if added else 0.0
            if gene is None:
                return None
            scale_genes.append(gene)
            next_layer += len(added)
        genome = self._genome(self._outer_models.index(outer), chosen, scale_genes)
        return genome if self.pool.route(self.decode(genome), outer) == route else None

    @cached_property
    def _choices(self) -> tuple[tuple[Choice, ...], ...]:
        """The choices at each position."""
        positions = range(self.pool.depth)
        return tuple(position_choices(self.pool, self.spans, position) for position in positions)

    @cached_property
    def _outer_models(self) -> tuple[str, ...]:
        """The models that may give embeddings and head, `pool.begin` first."""
        begin = self.pool.begin
        if not self.outer:
            return (begin,)
        return (begin, *(name for name, _ in self.pool.models if name != begin))

    def _split_outer(self, genes: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
        """(which model gives embeddings and head, the other genes)."""
        count = len(self._outer_models)
        if count == 1:
            return 0, genes
        if not self.categorical:
            utilities = [0.0, *genes[: count - 1]]
            return utilities.index(max(utilities)), genes[count - 1 :]
        if genes[0] not in range(count):
            raise ValueError(
                f"a choice of embeddings and head is a whole number in [0, {count}), got {genes[0]:g}"
            )
        return int(genes[0]), genes[1:]

    def _utilities(self, genes: Sequence[float]) -> list[list[float]]:
        """The utility of each choice at each position; the choice of the largest is made."""
        if self.categorical:
            return [self._categorical_utilities(genes[p], p) for p in range(self.pool.depth)]
        utilities: list[list[float]] = []
        first = 0
        for choices in self._choices:
            last = first + len(choices) - 1
            utilities.append([0.0, *genes[first:last]])
            first = last
        return utilities

    def _categorical_utilities(self, gene: float, position: int) -> list[float]:
        count = len(self._choices[position])
        if gene not in range(count):
            raise ValueError(f"a choice at layer {position} is a whole number in [0, {count}), got {gene:g}")
        utilities = [_KEEP_UTILITY, *[0.0] * (count - 1)]
        utilities[int(gene)] = 1.0
        return utilities

    def _chosen_layers(self, chosen: Sequence[int]) -> list[tuple[LayerRef, ...]]:
        """The layers that each position puts on the route."""
        return [choices[number].layers for choices, number in zip(self._choices, chosen, strict=True)]

    def _repaired(self, chosen: list[int], utilities: Sequence[Sequence[float]]) -> list[int]:
        """The choices within the bounds.

        First routes are shortened, then, if that went too far, lengthened within the most.
        """
        least, most = self.pool.bounds
        length = sum(map(len, self._chosen_layers(chosen)))
        while not least <= length <= most:
            moves = list(self._moves(chosen, length, utilities))
            if length > most:
                shorter = [move for move in moves if move.length < length]
                moves = [move for move in shorter if move.length >= least] or shorter
            else:
                moves = [move for move in moves if length < move.length <= most]
            cheapest = min(moves, key=lambda move: (move.loss, move.position, move.choice))
            chosen = [*chosen[: cheapest.position], cheapest.choice, *chosen[cheapest.position + 1 :]]
            length = cheapest.length
        return chosen

    def _moves(
        self, chosen: Sequence[int], length: int, utilities: Sequence[Sequence[float]]
    ) -> Iterator[_Move]:
        """Every change of one position's choice."""
        for position, choices in enumerate(self._choices):
            made = chosen[position]
            for number, choice in enumerate(choices):
                if number != made:
                    loss = utilities[position][made] - utilities[position][number]
                    new_length = length - len(choices[made].layers) + len(choice.layers)
                    yield _Move(loss, position, number, new_length)

    def _parsed(self, layers: Sequence[LayerRef]) -> list[int] | None:
        """The choices, as few as possible not keep, that make a route; None if none do.

        Dynamic programming from the end: for each position and layer of the route that is reached there, the
        fewest changes that make the rest, and the choice that begins it.
        """
        positions, total = len(self._choices), len(layers)
        best: dict[tuple[int, int], tuple[int, int]] = {(positions, total): (0, 0)}  # -> (changes, choice)
        for position in reversed(range(positions)):
            for reached in range(total + 1):
                options: list[tuple[int, int]] = []
                for number, choice in enumerate(self._choices[position]):
                    end = reached + len(choice.layers)
                    rest = best.get((position + 1, end))
                    if rest is not None and tuple(layers[reached:end]) == choice.layers:
                        options.append((rest[0] + (number > 0), number))
                if options:
                    best[position, reached] = min(options)
        chosen: list[int] = []
        reached = 0
        for position, choices in enumerate(self._choices):
            if (position, reached) not in best:
                return None
            chosen.append(best[position, reached][1])
            reached += len(choices[chosen[-1]].layers)
        return chosen

    def _genome(self, outer: int, chosen: Sequence[int], scale_genes: Sequence[float]) -> tuple[float, ...]:
        """The genome of choices."""
        counts = [len(choices) for choices in self._choices]
        made = list(chosen)
        if len(self._outer_models) > 1:
            counts = [len(self._outer_models), *counts]
            made = [outer, *made]
        genes: list[float] = []
        for count, choice in zip(counts, made, strict=True):
            genes += [float(choice)] if self.categorical else self._continuous_genes(count, choice)
        if self.scales == "hop":
            genes += scale_genes
        return tuple(genes)

    def _continuous_genes(self, count: int, choice: int) -> list[float]:
        """The genes of a choice, about which a sample makes another one with 1 - `keep_probability`."""
        margin = self.sigma * NormalDist().inv_cdf(self.keep_probability ** (1 / (count - 1)))
        return [margin if number == choice else -margin for number in range(1, count)]


@dataclass(frozen=True, slots=True)
class _Move:
    """A change of one position's choice. loss: of utility; length: of the route after it."""

    loss: float
    position: int
    choice: int
    length: int


_KEEP, _SKIP, _REPLACE, _INSERT = "keep", "skip", "replace", "insert"
_KIND_WEIGHTS = {_KEEP: 1.0, _SKIP: 1.0, _REPLACE: 3.0, _INSERT: 1.0}


def _kind(number: int, choice: Choice) -> str:
    """What a choice does; number: among those of its position."""
    if number == 0:
        return _KEEP
    if not choice.layers:
        return _SKIP
    return _REPLACE if len(choice.layers) == 1 else _INSERT


def _matching_layer(position: int, depth: int, other_depth: int) -> int:
    """The layer of a model of another depth that a position of the path stands for; halves are rounded up."""
    if depth == other_depth:
        return position
    if depth == 1:
        return 0
    return (2 * position * (other_depth - 1) + depth - 1) // (2 * (depth - 1))
