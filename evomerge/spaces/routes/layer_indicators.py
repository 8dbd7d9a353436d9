"""Routes by indicators: every layer of every model is on the route or not, several times over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.base import finite_genes
from evomerge.spaces.routes.layer_pool import SIGMA, Gene, LayerPool, LayerRef, Scales, mutation_probability


@dataclass(frozen=True)
class LayerIndicatorSpace:
    """All layers of all models in order, `repeats` times over: a position is used where its gene is above 0.

    Too long a route loses the positions of the smallest genes, too short a one gains those of the largest; of
    equal genes the earlier position counts as larger. Genes: the positions, then the scales.

    Example:
        space = LayerIndicatorSpace(LayerPool((("math", 32), ("code", 32)), "math", bounds=(24, 48)))

    Attributes:
        pool: The layers of a route; a search starts at the path of its `begin`.
        scales: 'hop' has a log scale for each position, 'matrix' one for each (layer before, layer), where
            layers of all rounds are the same; the scale of a route's first layer is 1.
        expected_mutations: How many positions differ from the path of `begin` in a first sample with the
            standard deviation `sigma`, before the bounds; at most `MAX_MUTATED_SHARE` of all.
        repeats: How often the layers are gone through, at least 1.

    References:
        Akiba et al. 2024, arXiv:2403.13187, section 3.2.
    """

    pool: LayerPool
    scales: Scales = "hop"
    expected_mutations: float = 2.0
    repeats: int = 2

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")
        positions, least = len(self._positions), self.pool.bounds[0]
        if least > positions:
            raise ConfigError(
                f"a route has at most {positions} layers with {self.repeats} repeats; "
                f"ask for no more than that, got {least}"
            )
        mutation_probability(self.expected_mutations, positions)

    @property
    def sigma(self) -> float:
        """First standard deviation of the optimizer that the genes are made for."""
        return SIGMA

    @property
    def categories(self) -> tuple[int, ...]:
        """None of the genes is a choice."""
        return ()

    @property
    def keep_probability(self) -> float:
        """Probability that a first sample leaves a position as it is at the start."""
        return 1 - mutation_probability(self.expected_mutations, len(self._positions))

    @cached_property
    def axes(self) -> tuple[Gene, ...]:
        """One for each gene: the positions, then the scales."""
        layers = [f"layer {layer} of {model}" for model, layer in self.pool.layers]
        positions = layers
        if self.repeats > 1:
            positions = [f"{layer}, round {r + 1}" for r in range(self.repeats) for layer in layers]
        scales: list[str] = []
        if self.scales == "hop":
            scales = [f"scale before {position}" for position in positions]
        elif self.scales == "matrix":
            scales = [f"scale from {before} to {layer}" for before in layers for layer in layers]
        return tuple(Gene(name) for name in [*positions, *scales])

    @property
    def start(self) -> tuple[float, ...]:
        """The path of `begin`, in the first round; all scales 1."""
        first_round = range(len(self.pool.layers))
        path = [position for position in first_round if self._positions[position][0] == self.pool.begin]
        return self._genome(path, {})

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        genes = finite_genes(genome, len(self.axes))
        total = len(self._positions)
        largest_first = sorted(range(total), key=lambda position: (-genes[position], position))
        least, most = self.pool.bounds
        length = min(max(sum(gene > 0 for gene in genes[:total]), least), most)
        used = sorted(largest_first[:length])
        scales = [
            1.0 if place is None else self.pool.scale(genes[place]) for place in self._scale_genes(used)
        ]
        return self.pool.recipe([self._positions[position] for position in used], scales)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome of a route, on the earliest positions.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] genes; None for a recipe that no genome gives.
        """
        route = self.pool.route(recipe)
        if route is None:
            return None
        used: list[int] = []
        for layer in route.layers:
            first_free = used[-1] + 1 if used else 0
            if layer not in self._positions[first_free:]:
                return None
            used.append(self._positions.index(layer, first_free))
        scale_genes: dict[int, float] = {}
        for place, scale in zip(self._scale_genes(used), route.scales, strict=True):
            gene = self.pool.scale_gene(scale)
            if gene is None:
                return None
            if place is not None:
                scale_genes[place] = gene
        genome = self._genome(used, scale_genes)
        return genome if self.pool.route(self.decode(genome)) == route else None

    @cached_property
    def _positions(self) -> tuple[LayerRef, ...]:
        return self.pool.layers * self.repeats

    @cached_property
    def _layer_numbers(self) -> dict[LayerRef, int]:
        return {layer: number for number, layer in enumerate(self.pool.layers)}

    def _scale_genes(self, used: Sequence[int]) -> list[int | None]:
        """Where the genome holds the scale of each layer of a route; None where it is 1."""
        total, layers = len(self._positions), len(self._layer_numbers)
        if self.scales == "none":
            return [None] * len(used)
        if self.scales == "hop":
            return [None, *(total + position for position in used[1:])]
        numbers = [self._layer_numbers[self._positions[position]] for position in used]
        return [None, *(total + before * layers + number for before, number in pairwise(numbers))]

    def _genome(self, used: Sequence[int], scale_genes: dict[int, float]) -> tuple[float, ...]:
        """The genome that uses some positions, each by the margin that gives `keep_probability`."""
        margin = self.sigma * NormalDist().inv_cdf(self.keep_probability)
        genes = [-margin] * len(self._positions) + [0.0] * (len(self.axes) - len(self._positions))
        for position in used:
            genes[position] = margin
        for place, gene in scale_genes.items():
            genes[place] = gene
        return tuple(genes)
