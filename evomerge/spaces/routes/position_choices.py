"""Routes by changes of one model's path: at each of its layers a choice (as in SMM-Bench, arXiv 2509.02555, with insertions)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from evomerge.errors import ConfigError
from evomerge.recipes import Recipe
from evomerge.spaces.routes.layer_pool import SIGMA, Gene, Hop, LayerPool, Scales, finite, share

_KEEP = 0.75  # categorical genes: what is chosen is worth 1, keeping this, the rest 0; what a repair gives up first


@dataclass(frozen=True)
class PositionChoiceSpace:
    """At each position p of the path of `begin`, one of: keep the layer, skip it, take another model's layer in its place, or
    keep it and insert a span of layers of any model after it.

    models, begin, stage, bounds, scale_range, out_dtype: see `LayerPool`. In a model of another depth d, p stands for layer
    p (d - 1) / (D - 1), rounded. spans: lengths of the inserted spans, each of which ends at p; spans that begin below
    layer 0 are left out. scales: 'hop' has a log scale for each position: of the hidden state that enters the first of the
    position's layers, not those inserted after it; of a skipped position it does nothing, and before a route's first layer
    it is 1. outer: whether the model that gives embeddings and head is a choice too, the first, `begin` else.
    changes: how many positions change in a first sample with the standard deviation `sigma`, before the bounds, at
    most MOST of all.

    Genes: of each position, one for each choice but keep, and the choice of the largest gene above 0 is made, else keep;
    categorical: one whole number, the choice, in [0, categories). Then the scales. A route outside the bounds is repaired:
    as often as needed, the position changes its choice that loses the least by it (the difference of the two genes, keep
    being 0; in categorical genes what was not kept is kept first), the earlier one of equals.
    """

    models: tuple[tuple[str, int], ...]
    begin: str
    stage: tuple[str, Recipe] | None = None
    bounds: tuple[int, int] = (1, 10**6)
    scales: Scales = "hop"
    scale_range: tuple[float, float] = (0.4, 1.5)
    changes: float = 2.0
    out_dtype: str = "bfloat16"
    spans: tuple[int, ...] = (1, 2)
    categorical: bool = False
    outer: bool = False
    sigma: float = field(init=False, default=SIGMA)
    axes: tuple[Gene, ...] = field(init=False, repr=False)
    categories: tuple[int, ...] = field(init=False)
    stay: float = field(init=False)
    _pool: LayerPool = field(init=False, repr=False)
    _choices: tuple[tuple[tuple[Hop, ...], ...], ...] = field(init=False, repr=False)
    _outers: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pool = LayerPool(self.models, self.begin, self.stage, self.bounds, self.scale_range, self.out_dtype)
        if self.scales == "matrix":
            raise ConfigError(
                "scales between any two layers belong to an indicator genome; ask for scales of hops, or none"
            )
        if any(w < 1 for w in self.spans):
            raise ConfigError(f"the length of an inserted span is at least 1, got {list(self.spans)}")
        least = self.bounds[0]
        if least > pool.depth and (1 not in self.spans or least > 2 * pool.depth):
            rule = f"at most twice the {pool.depth} layers of {self.begin}, and spans must hold 1"
            raise ConfigError(
                f"a route of at least {least} layers by changes of single positions: the least must be {rule}"
            )
        object.__setattr__(self, "_pool", pool)
        named = [self._named(p) for p in range(pool.depth)]
        object.__setattr__(self, "_choices", tuple(tuple(own) for own in named))
        outers = (
            (self.begin, *(name for name, _ in self.models if name != self.begin))
            if self.outer
            else (self.begin,)
        )
        object.__setattr__(self, "_outers", outers)
        lead = [len(outers)] if len(outers) > 1 else []
        object.__setattr__(
            self, "categories", (*lead, *(len(own) for own in named)) if self.categorical else ()
        )
        object.__setattr__(self, "stay", 1 - share(self.changes, pool.depth))
        names = (
            [f"choice at layer {p}" for p in range(pool.depth)]
            if self.categorical
            else [n for own in named for n in list(own.values())[1:]]
        )
        first = (
            ["embeddings and head"] * len(lead)
            if self.categorical
            else [f"embeddings and head of {name}" for name in outers[1:]]
        )
        names = first + names
        names += [f"scale before layer {p}" for p in range(pool.depth)] if self.scales == "hop" else []
        object.__setattr__(self, "axes", tuple(Gene(name) for name in names))

    @property
    def likely(self) -> tuple[tuple[float, ...], ...]:
        """Of each categorical gene, how likely each choice is as a new one: as often a layer of another model in place of it as
        skipped, kept and inserted after, together; equal ones for embeddings and head."""
        lead = [(1.0,) * len(self._outers)] if len(self._outers) > 1 else []
        found = []
        for own in self._choices:
            kinds = [
                min(len(hops), 2) if c != 0 else 3 for c, hops in enumerate(own)
            ]  # 3: keep, 0: skip, 1: take, 2: insert
            found.append(tuple((3.0 if kind == 1 else 1.0) / kinds.count(kind) for kind in kinds))
        return (*lead, *found) if self.categorical else ()

    @property
    def start(self) -> tuple[float, ...]:
        """Every layer kept, all scales 1."""
        return self._genome(0, [0] * len(self._choices), [0.0] * len(self._choices))

    def choices(self, position: int) -> tuple[tuple[Hop, ...], ...]:
        """The layers that each choice at a position puts on the route; the first choice keeps, the second skips."""
        return self._choices[position]

    def decode(self, genome: Sequence[float]) -> Recipe:
        """The recipe of a genome [len(axes)]; raises ValueError for another length, a value that is not finite, or a choice
        that is no whole number of those there are."""
        genes = finite(genome, len(self.axes))
        outer, rest = self._outer(genes)
        utilities = self._utilities(rest)
        chosen = self._repaired([own.index(max(own)) for own in utilities], utilities)
        depth, hops, scales = len(self._choices), list[Hop](), list[float]()
        for p, own in enumerate(self._hops(chosen)):
            hops += own
            first = self._pool.scale(genes[p - depth]) if self.scales == "hop" and own else 1.0
            scales += [first, *[1.0] * (len(own) - 1)] if own else []
        return self._pool.recipe(hops, scales, self._outers[outer])

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """A genome whose recipe this is, with the fewest positions changed; None if there is none."""
        name = recipe.embeddings.sources[0][0]
        found = self._pool.route(recipe, name) if name in self._outers else None
        chosen = self._parsed(found[0]) if found else None
        if found is None or chosen is None:
            return None
        genes, at = [], 0
        for own in self._hops(chosen):
            gene = self._pool.scale_gene(found[1][at]) if own else 0.0
            if gene is None:
                return None
            genes.append(gene)
            at += len(own)
        genome = self._genome(self._outers.index(name), chosen, genes)
        return genome if self._pool.route(self.decode(genome), name) == found else None

    def _named(self, position: int) -> dict[tuple[Hop, ...], str]:
        """Layers on the route -> name, of each choice at a position: keep, skip, take, insert."""
        keep: Hop = (self.begin, position)
        found: dict[tuple[Hop, ...], str] = {(keep,): f"keep layer {position}", (): f"skip layer {position}"}
        at = {name: self._layer(depth, position) for name, depth in self.models}
        for name, last in at.items():
            found.setdefault(((name, last),), f"layer {last} of {name} in place of layer {position}")
        for name, last in at.items():
            for width in self.spans:
                if width <= last + 1:
                    span = tuple((name, layer) for layer in range(last - width + 1, last + 1))
                    what = f"layers {span[0][1]}-{last}" if width > 1 else f"layer {last}"
                    found.setdefault((keep, *span), f"{what} of {name} after layer {position}")
        return found

    def _layer(self, depth: int, position: int) -> int:
        """The layer of a model that a position stands for; halves are rounded up."""
        own = self._pool.depth
        return (
            position
            if depth == own
            else (2 * position * (depth - 1) + own - 1) // (2 * (own - 1))
            if own > 1
            else 0
        )

    def _outer(self, genes: tuple[float, ...]) -> tuple[int, tuple[float, ...]]:
        """(which model gives embeddings and head, the other genes)."""
        count = len(self._outers)
        if count == 1:
            return 0, genes
        if not self.categorical:
            own = [0.0, *genes[: count - 1]]
            return own.index(max(own)), genes[count - 1 :]
        if genes[0] not in range(count):
            raise ValueError(
                f"a choice of embeddings and head is a whole number in [0, {count}), got {genes[0]:g}"
            )
        return int(genes[0]), genes[1:]

    def _utilities(self, genes: Sequence[float]) -> list[list[float]]:
        """What each choice at each position is worth; the largest is made."""
        out, at = [], 0
        for own in self._choices:
            if not self.categorical:
                out.append([0.0, *genes[at : at + len(own) - 1]])
                at += len(own) - 1
                continue
            gene = genes[len(out)]
            if gene not in range(len(own)):
                raise ValueError(
                    f"a choice at layer {len(out)} is a whole number in [0, {len(own)}), got {gene:g}"
                )
            out.append([_KEEP, *[0.0] * (len(own) - 1)])
            out[-1][int(gene)] = 1.0
        return out

    def _hops(self, chosen: Sequence[int]) -> list[tuple[Hop, ...]]:
        return [own[c] for own, c in zip(self._choices, chosen, strict=True)]

    def _repaired(self, chosen: list[int], utilities: Sequence[Sequence[float]]) -> list[int]:
        """The choices within the bounds. First routes are shortened, then, if that went too far, lengthened within the most."""
        least, most = self.bounds
        while not least <= (length := sum(map(len, self._hops(chosen)))) <= most:
            moves = [
                (utilities[p][chosen[p]] - utilities[p][c], p, c, after)
                for p, c, after in self._moves(chosen, length)
            ]
            if length > most:
                moves = [m for m in moves if m[3] < length]
                moves = [m for m in moves if m[3] >= least] or moves
            else:
                moves = [m for m in moves if length < m[3] <= most]
            _, position, choice, _ = min(moves)
            chosen = [*chosen[:position], choice, *chosen[position + 1 :]]
        return chosen

    def _moves(self, chosen: Sequence[int], length: int) -> Iterator[tuple[int, int, int]]:
        """(position, another choice there, length of the route with it)."""
        for p, own in enumerate(self._choices):
            for c, hops in enumerate(own):
                if c != chosen[p]:
                    yield p, c, length - len(own[chosen[p]]) + len(hops)

    def _parsed(self, hops: Sequence[Hop]) -> list[int] | None:
        """The choices, as few as possible not keep, that make a route; None if none do. Dynamic programming from the end."""
        total = len(hops)
        best: dict[tuple[int, int], tuple[int, int]] = {
            (len(self._choices), total): (0, 0)
        }  # (position, hop) -> (changes, choice)
        for p in reversed(range(len(self._choices))):
            for i in range(total + 1):
                found = []
                for c, own in enumerate(self._choices[p]):
                    after = best.get((p + 1, i + len(own)))
                    if after and tuple(hops[i : i + len(own)]) == own:
                        found.append((after[0] + (c > 0), c))
                if found:
                    best[p, i] = min(found)
        chosen, i = list[int](), 0
        while len(chosen) < len(self._choices):
            p = len(chosen)
            if (p, i) not in best:
                return None
            chosen.append(best[p, i][1])
            i += len(self._choices[p][chosen[-1]])
        return chosen

    def _genome(self, outer: int, chosen: Sequence[int], scales: Sequence[float]) -> tuple[float, ...]:
        choices = [(len(self._outers), outer)] if len(self._outers) > 1 else []
        genes: list[float] = []
        for count, choice in [
            *choices,
            *((len(own), c) for own, c in zip(self._choices, chosen, strict=True)),
        ]:
            if self.categorical:
                genes.append(float(choice))
            else:  # the probability that none of the other choices' genes is above 0 is `stay`
                margin = self.sigma * NormalDist().inv_cdf(self.stay ** (1 / (count - 1)))
                genes += [margin if c == choice else -margin for c in range(1, count)]
        return (*genes, *(scales if self.scales == "hop" else ()))
