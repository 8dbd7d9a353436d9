"""Routes by indicators (Akiba et al. 2024, arXiv 2403.13187, section 3.2): every layer of every model is on the way or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.routes.layer_pool import SIGMA, Gene, Hop, LayerPool, Scales, finite, share


@dataclass(frozen=True)
class LayerIndicatorSpace:
    """All layers of all models in order, `repeats` times over; a position is on the route where its gene is above 0.

    models, begin, stage, bounds, scale_range, out_dtype: see `LayerPool`. Too long a route loses the positions of the smallest
    genes, too short a one gains those of the largest; of equal genes the earlier position counts as larger.
    scales: 'hop' has a log scale for each position, 'matrix' one for each (layer before, layer), where layers of all rounds
    are the same; the first hop's is 1. changes: how many positions differ from the path of `begin` in a first sample with
    the standard deviation `sigma`, before the bounds, at most MOST of all. Genes: the positions, then the scales.
    """

    models: tuple[tuple[str, int], ...]
    begin: str
    stage: tuple[str, Recipe] | None = None
    bounds: tuple[int, int] = (1, 10**6)
    scales: Scales = "hop"
    scale_range: tuple[float, float] = (0.4, 1.5)
    changes: float = 2.0
    out_dtype: str = "bfloat16"
    repeats: int = 2
    sigma: float = field(init=False, default=SIGMA)
    axes: tuple[Gene, ...] = field(init=False, repr=False)
    categories: tuple[int, ...] = field(init=False, default=())
    stay: float = field(init=False)
    _pool: LayerPool = field(init=False, repr=False)
    _positions: tuple[Hop, ...] = field(init=False, repr=False)
    _index: dict[Hop, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pool = LayerPool(self.models, self.begin, self.stage, self.bounds, self.scale_range, self.out_dtype)
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")
        positions = pool.layers * self.repeats
        if self.bounds[0] > len(positions):
            raise ConfigError(
                f"a route has at most {len(positions)} layers with {self.repeats} repeats; ask for no more than that, got {self.bounds[0]}"
            )
        object.__setattr__(self, "_pool", pool)
        object.__setattr__(self, "_positions", positions)
        object.__setattr__(self, "_index", {hop: i for i, hop in enumerate(pool.layers)})
        object.__setattr__(self, "stay", 1 - share(self.changes, len(positions)))
        object.__setattr__(self, "axes", tuple(Gene(name) for name in self._names()))

    @property
    def start(self) -> tuple[float, ...]:
        """The path of `begin`, in the first round; all scales 1."""
        own = [t for t in range(len(self._index)) if self._positions[t][0] == self.begin]
        return self._genome(own, {})

    def decode(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome [len(axes)]; raises ValueError for another length or a value that is not finite."""
        genes = finite(genome, len(self.axes))
        total = len(self._positions)
        order = sorted(range(total), key=lambda t: (-genes[t], t))
        wanted = min(max(sum(g > 0 for g in genes[:total]), self.bounds[0]), self.bounds[1])
        used = sorted(order[:wanted])
        places = self._places(used)
        scales = [1.0 if place is None else self._pool.scale(genes[place]) for place in places]
        return self._pool.recipe([self._positions[t] for t in used], scales)

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """A genome whose route this is, on the earliest positions; None if there is none."""
        found = self._pool.route(recipe)
        if found is None:
            return None
        used: list[int] = []
        for hop in found[0]:
            after = used[-1] + 1 if used else 0
            if hop not in self._positions[after:]:
                return None
            used.append(self._positions.index(hop, after))
        genes: dict[int, float] = {}
        for place, scale in zip(self._places(used), found[1], strict=True):
            gene = self._pool.scale_gene(scale)
            if gene is None:
                return None
            if place is not None:
                genes[place] = gene
        genome = self._genome(used, genes)
        return genome if self._pool.route(self.decode(genome)) == found else None

    def _places(self, used: Sequence[int]) -> list[int | None]:
        """Where the genome holds the scale of each hop; None where it is 1."""
        total, layers = len(self._positions), len(self._index)
        if self.scales == "none":
            return [None] * len(used)
        if self.scales == "hop":
            return [None, *(total + t for t in used[1:])]
        rows = [self._index[self._positions[t]] for t in used]
        return [None, *(total + a * layers + b for a, b in pairwise(rows))]

    def _genome(self, used: Sequence[int], scales: dict[int, float]) -> tuple[float, ...]:
        margin = self.sigma * NormalDist().inv_cdf(self.stay)
        genes = [-margin] * len(self._positions) + [0.0] * (len(self.axes) - len(self._positions))
        for t in used:
            genes[t] = margin
        for place, gene in scales.items():
            genes[place] = gene
        return tuple(genes)

    def _names(self) -> list[str]:
        layers = [f"layer {layer} of {model}" for model, layer in self._index]
        names = [
            f"{layer}{f', round {r + 1}' if self.repeats > 1 else ''}"
            for r in range(self.repeats)
            for layer in layers
        ]
        if self.scales == "hop":
            return names + [f"scale before {name}" for name in names]
        if self.scales == "matrix":
            return names + [f"scale from {a} to {b}" for a in layers for b in layers]
        return names
