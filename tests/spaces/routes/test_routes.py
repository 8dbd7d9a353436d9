"""Route genomes: what a genome means, said a second time in loops; that nothing bad is ever decoded; and the
way back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge import _yaml
from evomerge.errors import ConfigError
from evomerge.methods import method
from evomerge.optimizers.cat_cma import CatCma
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Mix, Recipe, mergekit_yaml
from evomerge.spaces import Range
from evomerge.spaces.routes.hand_routes import hand_routes
from evomerge.spaces.routes.layer_indicators import LayerIndicatorSpace
from evomerge.spaces.routes.layer_pool import LOG_SCALE_STEP, MAX_MUTATED_SHARE, LayerPool
from evomerge.spaces.routes.position_choices import PositionChoiceSpace
from tests.support.toy import weight_space

RouteSpace = LayerIndicatorSpace | PositionChoiceSpace
Hops = list[tuple[str, int]]
_POOL_FIELDS = {field.name for field in fields(LayerPool)}


def indicator_space(
    models: Sequence[tuple[str, int]], begin: str, stage: tuple[str, Recipe] | None = None, **more: Any
) -> LayerIndicatorSpace:
    """A space with options of it and of its pool."""
    of_pool = {name: value for name, value in more.items() if name in _POOL_FIELDS}
    others = {name: value for name, value in more.items() if name not in _POOL_FIELDS}
    return LayerIndicatorSpace(LayerPool(tuple(models), begin, stage, **of_pool), **others)


def choice_space(models: Sequence[tuple[str, int]], begin: str, **more: Any) -> PositionChoiceSpace:
    """A space with options of it and of its pool."""
    of_pool = {name: value for name, value in more.items() if name in _POOL_FIELDS}
    others = {name: value for name, value in more.items() if name not in _POOL_FIELDS}
    return PositionChoiceSpace(LayerPool(tuple(models), begin, **of_pool), **others)


MODELS = (("a", 6), ("b", 4), ("c", 9))
EVERY = {
    "indicator": lambda **more: indicator_space(MODELS, "a", scales="none", **more),
    "indicator, hop": lambda **more: indicator_space(MODELS, "a", **more),
    "indicator, matrix": lambda **more: indicator_space((("b", 2), ("a", 3)), "a", scales="matrix", **more),
    "continuous": lambda **more: choice_space(MODELS, "a", spans=(1, 2, 3), **more),
    "continuous, no scales": lambda **more: choice_space(MODELS, "c", scales="none", **more),
    "categorical": lambda **more: choice_space(MODELS, "a", spans=(1, 2, 3), categorical=True, **more),
    "categorical, no scales": lambda **more: choice_space(
        MODELS, "c", scales="none", categorical=True, **more
    ),
}
each = pytest.mark.parametrize("kind", EVERY)


def route(recipe: Recipe) -> Hops:
    """The layers on the way, from a recipe that passes each of them through."""
    assert all(
        mix.method == "passthrough" and len(mix.sources) == 1 and mix.base is None for mix in recipe.mixes
    )
    assert all(mix.params in ((), (("scale", (1.0,)),)) for mix in recipe.mixes)
    return [(model, layer) for mix in recipe.layers for model, layer in mix.sources if layer is not None]


def stack(hops: Sequence[tuple[str, int]], own: str = "a", **more: object) -> Recipe:
    """A route as a recipe, written by hand."""
    outer = Mix("passthrough", ((own, None),))
    return replace(Recipe(own, tuple(Mix("passthrough", (hop,)) for hop in hops), outer, outer), **more)  # type: ignore[arg-type]


def genomes(space: RouteSpace) -> st.SearchStrategy[list[float]]:
    """Any genome of a space: near the start, far away, on a grid with ties, with zeros."""
    lead = [st.integers(0, k - 1).map(float) for k in space.categories]
    coarse = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])
    free = st.one_of(st.floats(-3, 3), coarse, st.floats(-1e300, 1e300))
    return st.tuples(*lead, *[free] * (len(space.axes) - len(lead))).map(list)


def first_sample(space: RouteSpace, size: int, seed: int = 0) -> list[list[float]]:
    """What the optimizer of a space asks first."""
    if space.categories:
        return (
            CatCma(
                space.start,
                space.sigma,
                categories=space.categories,
                keep_probability=space.keep_probability,
                population=size,
                seed=seed,
            )
            .ask()
            .tolist()
        )  # type: ignore[no-any-return]
    return CmaEs(space.start, space.sigma, population=size, diagonal=True, seed=seed).ask().tolist()  # type: ignore[no-any-return]


# ---- laws of every route space -----------------------------------------------------------------------------


@each
@given(data=st.data())
def test_every_genome_is_a_route_within_the_bounds_and_comes_back(kind: str, data: st.DataObject) -> None:
    space = EVERY[kind](bounds=data.draw(st.sampled_from([(1, 40), (3, 5), (6, 6), (5, 8), (7, 9), (2, 2)])))
    recipe = space.decode(data.draw(genomes(space)))
    depths = dict(space.pool.models)
    assert space.pool.bounds[0] <= len(recipe.layers) <= space.pool.bounds[1]
    assert all(0 <= layer < depths[model] for model, layer in route(recipe))
    assert recipe.embeddings == recipe.head == Mix("passthrough", ((space.pool.begin, None),))
    assert (recipe.base, recipe.stages) == (space.pool.begin, ())
    assert all(0.4 <= s <= 1.5 and s == round(s, 4) for s in recipe.scales)
    assert not recipe.scales or (recipe.scales[0] == 1 and space.scales != "none")
    genome = space.encode(recipe)
    assert genome is not None
    assert space.decode(genome) == recipe
    assert Recipe.from_json(recipe.canonical()) == recipe


@each
def test_the_start_is_the_path_of_the_model_that_begins(kind: str) -> None:
    space = EVERY[kind]()
    recipe = space.decode(space.start)
    assert recipe == stack(
        [(space.pool.begin, i) for i in range(dict(space.pool.models)[space.pool.begin])], space.pool.begin
    )
    assert space.encode(recipe) == space.start
    assert len(space.axes) == len(space.start) == len({axis.name for axis in space.axes})


@each
def test_routes_that_a_space_cannot_hold_have_no_genome(kind: str) -> None:
    own = dict(EVERY[kind]().pool.models)["c" if "no scales" in kind else "a"]
    space = EVERY[kind](bounds=(2, own + 1))
    path = [(space.pool.begin, i) for i in range(own)]
    whole = stack(path, space.pool.begin)
    merged = weight_space(
        "linear", ("b", "c"), (own,), ("attention",), {"weight": Range(0.0, 1.0, 0.5)}
    ).uniform({})
    others = {
        "layer that there is not": stack([*path, (space.pool.begin, own)], space.pool.begin),
        "model that there is not": stack([*path, ("d", 0)], space.pool.begin),
        "too short": stack(path[:1], space.pool.begin),
        "too long": stack(path * 2, space.pool.begin),
        "other embeddings": replace(
            whole, embeddings=Mix("passthrough", (("c" if space.pool.begin != "c" else "a", None),))
        ),
        "other head": replace(
            whole, head=Mix("passthrough", (("c" if space.pool.begin != "c" else "a", None),))
        ),
        "other type": replace(whole, out_dtype="float32"),
        "backwards": stack(path[::-1], space.pool.begin),
        "scale beyond the range": replace(whole, scales=(1.0, 1.6, *[1.0] * (own - 2))),
        "scale between the snapped ones": replace(whole, scales=(1.0, 0.98765, *[1.0] * (own - 2))),
        "weights": merged,
        "a layer times 2": replace(
            whole,
            layers=(
                Mix("passthrough", whole.layers[0].sources, None, (("scale", (2.0,)),)),
                *whole.layers[1:],
            ),
        ),
        "one layer merged": replace(whole, layers=(*whole.layers[:-1], merged.layers[-1])),
    }
    if space.scales == "none":
        others["scale"] = replace(whole, scales=(1.0, 0.9, *[1.0] * (own - 2)))
    for what, recipe in others.items():
        assert space.encode(recipe) is None, what
    assert space.encode(whole) == space.start
    assert space.encode(replace(whole, base="other")) == space.encode(whole), (
        "a parent as a weight search writes it has that search's base"
    )


@each
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_genome_that_is_none_is_refused(kind: str, bad: float | None) -> None:
    space = EVERY[kind]()
    genome = [*space.start[:-1], *([bad] if bad is not None else [])]
    with pytest.raises(ValueError, match=f"{len(space.axes)} finite numbers"):
        space.decode(genome)


@each
@pytest.mark.parametrize("changes", [0.5, 1.0, 2.0])
def test_a_first_sample_changes_about_as_many_positions_as_asked(kind: str, changes: float) -> None:
    """Exactly binomial: each position changes with probability changes / positions, on its own."""
    space, size = EVERY[kind](expected_mutations=changes), 600
    sample = np.array(first_sample(space, size))
    if isinstance(space, LayerIndicatorSpace):
        positions = sum(d for _, d in space.pool.models) * space.repeats
        changed = (sample[:, :positions] > 0) != (np.array(space.start[:positions]) > 0)
    else:
        positions = dict(space.pool.models)[space.pool.begin]
        kept = [[route(space.decode(g))] for g in sample.tolist()]
        if space.categories:
            changed = sample[:, :positions] != 0
        else:
            widths = [len(space.choices(p)) - 1 for p in range(positions)]
            cuts = np.cumsum([0, *widths])
            changed = np.array(
                [[max(g[a:b]) > 0 for a, b in itertools.pairwise(cuts)] for g in sample.tolist()]
            )
        own = [(space.pool.begin, i) for i in range(positions)]
        assert [not row.any() for row in changed] == [k == [own] for k in kept]
    assert positions * MAX_MUTATED_SHARE > changes
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], size * positions, changes / positions)
    assert low <= changed.sum() <= high
    each_low, each_high = stats.binom.ppf([1e-8, 1 - 1e-8], size, changes / positions)
    assert ((changed.sum(axis=0) >= each_low) & (changed.sum(axis=0) <= each_high)).all()
    assert space.keep_probability == pytest.approx(1 - changes / positions)


@each
def test_more_changes_than_positions_are_capped(kind: str) -> None:
    space = EVERY[kind](expected_mutations=1000.0)
    assert space.keep_probability == pytest.approx(1 - MAX_MUTATED_SHARE)
    assert route(space.decode(space.start)) == [
        (space.pool.begin, i) for i in range(dict(space.pool.models)[space.pool.begin])
    ]


# ---- scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_range", [(0.4, 1.5), (0.9, 1.1), (0.01, 20.0)])
def test_scales_are_a_monotone_map_onto_their_range_and_back(scale_range: tuple[float, float]) -> None:
    pool = LayerPool(MODELS, "a", scale_range=scale_range)
    genes = np.linspace(-4000, 4000, 8001)
    found = [pool.scale(float(g)) for g in genes]
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert (found[0], found[-1], pool.scale(0.0)) == (*scale_range, 1.0)
    assert (math.log(pool.scale(0.4)) - math.log(pool.scale(-0.4))) / 0.8 == pytest.approx(
        LOG_SCALE_STEP, rel=0.05
    )
    for k in range(round(scale_range[0] * 1e4), min(round(scale_range[1] * 1e4), 30_000) + 1):
        gene = pool.scale_gene(k / 1e4)
        assert gene is not None
        assert pool.scale(gene) == k / 1e4
    assert pool.scale_gene(scale_range[1] + 1e-4) is None
    assert pool.scale_gene(1.00005) is None


def test_a_first_samples_log_scales_have_the_deviation_step() -> None:
    space = indicator_space(MODELS, "a", bounds=(6, 6), expected_mutations=1e-9)
    logs = np.log([space.decode(g).scales[1:] for g in first_sample(space, 800)])
    assert logs.std() == pytest.approx(LOG_SCALE_STEP, rel=0.05)
    assert abs(logs.mean()) < LOG_SCALE_STEP / 10


def test_a_scale_of_the_matrix_belongs_to_a_pair_of_layers() -> None:
    space = indicator_space(MODELS, "a", scales="matrix", repeats=2)
    layers = [(m, i) for m, d in MODELS for i in range(d)]
    hops = [("a", 0), ("a", 1), ("b", 0), ("a", 0), ("a", 1), ("a", 2)]
    genome = [-1.0] * 38 + [0.0] * 19 * 19
    for t in (0, 1, 6, 19, 20, 21):
        genome[t] = 1.0
    genome[38 + 19 * layers.index(("a", 0)) + layers.index(("a", 1))] = -4.0
    genome[38 + 19 * layers.index(("b", 0)) + layers.index(("a", 0))] = 3.0
    recipe = space.decode(genome)
    assert route(recipe) == hops
    s, t = LayerPool(MODELS, "a").scale(-4.0), LayerPool(MODELS, "a").scale(3.0)
    assert recipe.scales == (1.0, s, 1.0, t, s, 1.0)
    assert space.encode(recipe) is not None
    assert space.encode(replace(recipe, scales=(1.0, s, 1.0, t, t, 1.0))) is None, "one pair, two scales"


def test_the_scale_of_a_position_is_that_before_its_first_layer() -> None:
    space = choice_space((("a", 3), ("b", 3)), "a", spans=(2,), categorical=True)
    choices = [space.choices(p) for p in range(3)]
    insert = choices[1].index((("a", 1), ("b", 0), ("b", 1)))
    scales = [LayerPool(MODELS, "a").scale(g) for g in (2.0, -5.0, 3.0)]
    assert space.decode([0, insert, 0, 2.0, -5.0, 3.0]) == stack(
        [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2)], scales=(1.0, scales[1], 1.0, 1.0, scales[2])
    )
    assert space.decode([1, 0, 1, 2.0, -5.0, 3.0]) == stack([("a", 1)])
    inside = stack([("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2)], scales=(1.0, 1.0, 0.9, 1.0, 1.0))
    assert space.encode(inside) is None, "a scale before an inserted layer has no gene"


# ---- indicators --------------------------------------------------------------------------------------------


def indicated(
    genome: Sequence[float], repeats: int, least: int, most: int, hop: bool
) -> tuple[Hops, list[float]]:
    """arXiv 2403.13187, section 3.2, in loops: a layer for each position that is on, one position after
    another until it fits."""
    positions = [(m, i) for _ in range(repeats) for m, d in MODELS for i in range(d)]
    on = [g > 0 for g in genome[: len(positions)]]
    while sum(on) > most:
        on[min((t for t in range(len(positions)) if on[t]), key=lambda t: (genome[t], -t))] = False
    while sum(on) < least:
        on[max((t for t in range(len(positions)) if not on[t]), key=lambda t: (genome[t], -t))] = True
    used = [t for t in range(len(positions)) if on[t]]
    scale = LayerPool(MODELS, "a").scale
    return [positions[t] for t in used], [1.0] + [
        scale(genome[len(positions) + t]) if hop else 1.0 for t in used[1:]
    ]


@given(
    data=st.data(),
    repeats=st.integers(1, 3),
    least=st.integers(1, 12),
    more=st.integers(0, 20),
    hop=st.booleans(),
)
def test_indicators_mean_what_the_paper_says(
    data: st.DataObject, repeats: int, least: int, more: int, hop: bool
) -> None:
    space = indicator_space(
        MODELS, "a", bounds=(least, least + more), repeats=repeats, scales="hop" if hop else "none"
    )
    genome = data.draw(genomes(space))
    hops, scales = indicated(genome, repeats, least, least + more, hop)
    assert space.decode(genome) == stack(hops, scales=tuple(scales))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@given(data=st.data())
def test_a_route_has_indicators_if_it_needs_no_more_rounds_than_there_are(
    repeats: int, data: st.DataObject
) -> None:
    space = indicator_space(MODELS, "a", repeats=repeats)
    layers = [(m, i) for m, d in MODELS for i in range(d)]
    hops = data.draw(st.lists(st.sampled_from(layers), min_size=1, max_size=8))
    rounds = 1 + sum(layers.index(b) <= layers.index(a) for a, b in itertools.pairwise(hops))
    assert (space.encode(stack(hops)) is not None) == (rounds <= repeats)


# ---- choices at each position ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("other", [1, 3, 4, 12])
def test_the_choices_at_a_position(own: int, other: int) -> None:
    space = choice_space((("z", other), ("a", own)), "a", spans=(1, 3))
    for p in range(own):
        exact = Fraction(p * (other - 1), own - 1) if own > 1 else Fraction(0)
        q = math.floor(exact + Fraction(1, 2))
        wanted: list[Hops] = [[("a", p)], [], [("z", q)]]
        for model, last in (("z", q), ("a", p)):
            wanted += [
                [("a", p), *((model, i) for i in range(last - w + 1, last + 1))]
                for w in (1, 3)
                if last - w >= -1
            ]
        assert [list(c) for c in space.choices(p)] == wanted


@pytest.mark.parametrize("categorical", [False, True])
def test_each_choice_at_each_position_can_be_made_and_is_sampled(categorical: bool) -> None:
    space = choice_space(MODELS, "a", spans=(1, 2), categorical=categorical, bounds=(1, 40), scales="none")
    made = set()
    for genome in first_sample(space, 3000):
        encoded = choice_space(
            MODELS, "a", spans=(1, 2), categorical=True, bounds=(1, 40), scales="none"
        ).encode(space.decode(genome))
        assert encoded is not None
        made |= {(p, int(c)) for p, c in enumerate(encoded)}
    assert made == {(p, c) for p in range(6) for c in range(len(space.choices(p)))}
    for p, c in sorted(made):
        hops = [hop for q in range(6) for hop in (space.choices(q)[c] if q == p else (("a", q),))]
        genome = space.encode(stack(hops))
        assert genome is not None
        assert route(space.decode(genome)) == hops


@given(data=st.data(), width=st.integers(0, 4))
def test_both_codings_are_one_decoder(data: st.DataObject, width: int) -> None:
    """The continuous genome with one positive gene a position is the categorical one, where nothing has to be
    repaired."""
    kinds = [choice_space(MODELS, "b", spans=(1, 2, 3), categorical=c, bounds=(1, 99)) for c in (False, True)]
    chosen = [data.draw(st.integers(0, len(kinds[0].choices(p)) - 1)) for p in range(4)]
    if all(c == 1 for c in chosen):
        chosen[width % 4] = 0
    scales = data.draw(st.lists(st.floats(-9, 9), min_size=4, max_size=4))
    utilities = [
        data.draw(st.floats(0.01, 3)) if c == k else -data.draw(st.floats(0, 3))
        for p, k in enumerate(chosen)
        for c in range(1, len(kinds[0].choices(p)))
    ]
    recipe = kinds[0].decode([*utilities, *scales])
    assert recipe == kinds[1].decode([*map(float, chosen), *scales])
    assert route(recipe) == [hop for p, c in enumerate(chosen) for hop in kinds[0].choices(p)[c]]


@given(data=st.data())
def test_the_largest_gene_above_zero_is_the_choice(data: st.DataObject) -> None:
    space = choice_space(MODELS, "b", bounds=(1, 99), scales="none")
    genome = data.draw(
        st.lists(
            st.integers(-50, 50).map(float), min_size=len(space.axes), max_size=len(space.axes), unique=True
        )
    )
    hops: Hops = []
    rest = list(genome)
    for p in range(4):
        own, rest = rest[: len(space.choices(p)) - 1], rest[len(space.choices(p)) - 1 :]
        hops += space.choices(p)[1 + own.index(max(own)) if max(own) > 0 else 0]
    if hops:
        assert route(space.decode(genome)) == hops


@pytest.mark.parametrize("categorical", [False, True])
@given(
    hops=st.lists(st.sampled_from([("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]), min_size=1, max_size=6)
)
def test_a_route_has_choices_if_any_choices_make_it(categorical: bool, hops: Hops) -> None:
    """Against all combinations of choices, tried one after another."""
    space = choice_space((("a", 3), ("b", 2)), "a", spans=(1, 2), categorical=categorical, bounds=(1, 9))
    numbers = [range(len(space.choices(p))) for p in range(3)]
    making = [
        c
        for c in itertools.product(*numbers)
        if [h for p, k in enumerate(c) for h in space.choices(p)[k]] == hops
    ]
    assert (space.encode(stack(hops)) is not None) == bool(making)


def test_of_several_ways_to_make_a_route_the_one_with_fewest_changes_is_found() -> None:
    """All routes of a small space that more than one combination of choices makes, plain and with a scale
    before one hop."""
    space = choice_space((("a", 4), ("b", 2), ("c", 3)), "a", spans=(1, 2), categorical=True, bounds=(1, 12))
    ways: dict[tuple[tuple[str, int], ...], list[tuple[int, ...]]] = {}
    for choices in itertools.product(*(range(len(space.choices(p))) for p in range(4))):
        ways.setdefault(tuple(h for p, c in enumerate(choices) for h in space.choices(p)[c]), []).append(
            choices
        )
    several = [hops for hops in ways if len(ways[hops]) > 1 and hops]
    assert len(several) > 300
    for number, hops in enumerate(several):
        at = 1 + number % (len(hops) - 1) if len(hops) > 1 else 0
        for scales, places in (
            ((), []),
            (tuple(0.9 if at and i == at else 1.0 for i in range(len(hops))), [at]),
        ):
            firsts = {
                c: np.cumsum([0] + [len(space.choices(p)[k]) for p, k in enumerate(c)]) for c in ways[hops]
            }
            fitting = [c for c in ways[hops] if at == 0 or all(i in firsts[c] for i in places)]
            genome = space.encode(stack(hops, scales=scales))
            assert (genome is not None) == bool(fitting)
            if genome:
                assert sum(g != 0 for g in genome[:4]) == min(
                    sum(c != 0 for c in choices) for choices in fitting
                )


@pytest.mark.parametrize("bad", [-1.0, 0.5, 99.0])
def test_a_choice_that_there_is_not_is_refused(bad: float) -> None:
    space = choice_space(MODELS, "a", categorical=True)
    with pytest.raises(ValueError, match="choice at layer 2"):
        space.decode([0.0, 0.0, bad, *space.start[3:]])


# ---- repairs of the length ---------------------------------------------------------------------------------


def test_what_loses_least_is_given_up_first() -> None:
    space = choice_space((("a", 4),), "a", spans=(1,), bounds=(3, 5), scales="none")
    assert [axis.name for axis in space.axes[:2]] == ["skip layer 0", "layer 0 of a after layer 0"]
    skip, insert = (
        [(0.9, -1.0), (0.5, -1.0), (0.7, -1.0), (-1.0, -1.0)],
        [(-1.0, 0.9), (-1.0, 0.5), (-1.0, 0.7), (-1.0, -1.0)],
    )
    a = [("a", i) for i in range(4)]
    assert route(space.decode([*itertools.chain(*skip)])) == [a[1], a[2], a[3]], (
        "two of three skips kept less than one that is wanted more"
    )
    assert route(space.decode([*itertools.chain(*insert)])) == [a[0], a[0], a[1], a[2], a[3]]


def test_a_route_that_every_change_makes_too_short_is_lengthened_again() -> None:
    space = choice_space((("a", 4),), "a", spans=(3,), bounds=(3, 3), scales="none", categorical=True)
    insert = space.choices(3).index((("a", 3), ("a", 1), ("a", 2), ("a", 3)))
    assert route(space.decode([1, 1, 1, insert])) == [("a", 0), ("a", 1), ("a", 3)]


@pytest.mark.parametrize("bounds", [(2, 2), (6, 7)])
def test_a_path_outside_the_bounds_is_itself_repaired(bounds: tuple[int, int]) -> None:
    for categorical in (False, True):
        space = choice_space((("a", 4), ("b", 4)), "a", spans=(1, 2), bounds=bounds, categorical=categorical)
        assert len(space.decode(space.start).layers) == bounds[0 if bounds[0] > 4 else 1]


def mended(
    choices: list[list[Hops]], chosen: list[int], worth: list[list[float]], least: int, most: int
) -> Hops:
    """The rule of the docstring in loops: one change after another, each the one that loses least of those
    that help."""
    while True:
        length = sum(len(own[c]) for own, c in zip(choices, chosen, strict=True))
        if least <= length <= most:
            return [hop for own, c in zip(choices, chosen, strict=True) for hop in own[c]]
        inside, beyond = [], []
        for p, own in enumerate(choices):
            for c, hops in enumerate(own):
                after = length + len(hops) - len(own[chosen[p]])
                change = (worth[p][chosen[p]] - worth[p][c], p, c)
                if (length > most and least <= after < length) or (length < least and length < after <= most):
                    inside.append(change)
                elif length > most and after < length:
                    beyond.append(change)
        _, p, c = min(inside or beyond)
        chosen[p] = c


@pytest.mark.parametrize("bounds", [(5, 7), (6, 6), (2, 3), (9, 11)])
@given(data=st.data(), categorical=st.booleans())
def test_a_route_is_repaired_by_the_changes_that_lose_least(
    bounds: tuple[int, int], data: st.DataObject, categorical: bool
) -> None:
    space = choice_space(
        (("a", 6), ("b", 3)), "a", spans=(1, 4), bounds=bounds, scales="none", categorical=categorical
    )
    genome = data.draw(genomes(space))
    choices = [[list(c) for c in space.choices(p)] for p in range(6)]
    rest, worth = list(genome), []
    for own in choices:
        if categorical:
            worth.append([1.0 if c == rest[0] else 0.75 if c == 0 else 0.0 for c in range(len(own))])
            rest = rest[1:]
        else:
            worth.append([0.0, *rest[: len(own) - 1]])
            rest = rest[len(own) - 1 :]
    chosen = [max(range(len(w)), key=lambda c: (w[c], -c)) for w in worth]
    assert route(space.decode(genome)) == mended(choices, chosen, worth, *bounds)


# ---- stages and settings -----------------------------------------------------------------------------------


def merged() -> Recipe:
    ranges = {p.name: Range(p.low, p.high, 0.5) for p in method("ties").params if p.name == "weight"}
    return weight_space("ties", ("a", "b"), (2, 2), ("attention", "mlp"), ranges).uniform({"weight": 0.7})


def test_a_stage_is_carried_by_the_routes_that_use_it_and_by_no_other() -> None:
    models = (("merged", 4), ("a", 4))
    stage = ("merged", merged())
    ours = indicator_space(models, "merged", stage)
    hybrid = ours.decode(ours.start)
    assert hybrid.stages == (stage,)
    assert hybrid.base == stage[1].base
    assert "merged" not in hybrid.models
    rest = [-1.0] * 4 + [1.0] * 4 + [-1.0] * 8 + [0.0] * 16
    assert ours.decode(rest).stages == (stage,), "its embeddings are used"
    theirs = indicator_space(models, "a", stage)
    plain = theirs.decode(theirs.start)
    assert (plain.stages, plain.base, plain.models) == ((), "a", ("a",))
    both = theirs.decode([1.0] * 2 + [-1.0] * 4 + [1.0] * 2 + [-1.0] * 8 + [0.0] * 16)
    assert route(both) == [("merged", 0), ("merged", 1), ("a", 2), ("a", 3)]
    assert (both.stages, both.base) == ((stage,), "a")
    assert theirs.encode(replace(both, stages=(("merged", replace(stage[1], seed=7)),))) is None
    for space, recipe in ((ours, hybrid), (theirs, plain), (theirs, both)):
        genome = space.encode(recipe)
        assert genome is not None
        assert space.decode(genome) == recipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: indicator_space((("a", 2), ("a", 3)), "a"), "names of their own"),
        (lambda: indicator_space((("a", 0),), "a"), "at least one layer"),
        (lambda: indicator_space(MODELS, "d"), "'d' is not among"),
        (lambda: indicator_space(MODELS, "a", ("m", merged())), "'m' is not among"),
        (lambda: indicator_space(MODELS, "a", ("a", merged())), "4 layers, not 6"),
        (lambda: indicator_space(MODELS, "a", bounds=(0, 4)), "at least 1"),
        (lambda: indicator_space(MODELS, "a", bounds=(5, 4)), "least, most"),
        (lambda: indicator_space(MODELS, "a", bounds=(39, 50)), "38"),
        (lambda: indicator_space(MODELS, "a", scale_range=(1.0, 1.5)), "hold 1"),
        (lambda: indicator_space(MODELS, "a", scale_range=(0.0, 1.5)), "0.0001"),
        (lambda: indicator_space(MODELS, "a", expected_mutations=0.0), "above 0"),
        (lambda: indicator_space(MODELS, "a", repeats=0), "repeats"),
        (lambda: choice_space(MODELS, "a", scales="matrix"), "indicator"),
        (lambda: choice_space(MODELS, "a", spans=(0,)), "at least 1"),
        (lambda: choice_space(MODELS, "a", bounds=(13, 20)), "twice the 6 layers"),
        (lambda: choice_space(MODELS, "a", spans=(2,), bounds=(7, 20)), "spans must hold 1"),
    ],
)  # fmt: skip
def test_settings_that_give_no_routes_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


# ---- stacks written by hand --------------------------------------------------------------------------------

SOLAR = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources: [{model: a, layer_range: [8, 32]}]
"""
FRANKEN = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 16]}]
  - sources: [{model: b, layer_range: [16, 31]}]
  - sources: [{model: a, layer_range: [31, 32]}]
"""
PAIR = (("a", 32), ("b", 32))
HOLDING = {
    "indicator": indicator_space(PAIR, "a"),
    "continuous": choice_space(PAIR, "a", spans=(1, 16)),
    "categorical": choice_space(PAIR, "a", spans=(1, 16), categorical=True),
}


@pytest.mark.parametrize("kind", HOLDING)
@pytest.mark.parametrize(
    ("text", "hops"),
    [
        (SOLAR, [("a", i) for i in (*range(24), *range(8, 32))]),
        (FRANKEN, [("a" if i < 16 or i == 31 else "b", i) for i in range(32)]),
    ],
    ids=["SOLAR", "frankenmerge"],
)
def test_mergekit_stacks_are_points_of_the_spaces(kind: str, text: str, hops: Hops) -> None:
    recipe = mergekit_yaml.load(_yaml.parse_all(text, "stack.yaml"), lambda reference: 32)
    assert route(recipe) == hops
    space = HOLDING[kind]
    genome = space.encode(recipe)
    assert genome is not None
    assert space.decode(genome) == stack(hops), (
        "which is the same but for factors of 1 that mergekit writes out"
    )
    short = (
        replace(space, spans=(1, 2)) if isinstance(space, PositionChoiceSpace) else replace(space, repeats=1)
    )
    assert (short.encode(recipe) is None) == (text == SOLAR or kind == "indicator")


def test_hand_routes_are_upscaled_models_and_halves_of_pairs() -> None:
    found = dict(hand_routes((("a", 32), ("b", 24), ("c", 5))))
    assert route(found["a up-scaled"]) == [("a", i) for i in (*range(24), *range(8, 32))]
    assert route(found["b up-scaled"]) == [("b", i) for i in (*range(18), *range(6, 24))]
    assert route(found["half a, half b"]) == [
        *(("a", i) for i in range(16)),
        *(("b", i) for i in range(12, 24)),
    ]
    assert route(found["half b, half c"]) == [
        *(("b", i) for i in range(12)),
        *(("c", i) for i in range(2, 5)),
    ]
    assert route(found["half c, half a"]) == [
        *(("c", i) for i in range(3)),
        *(("a", i) for i in range(16, 32)),
    ]
    assert len(found) == 9
    for label, recipe in found.items():
        own = label.split()[0 if "up-scaled" in label else 1].strip(",")
        assert recipe.base == recipe.embeddings.sources[0][0] == recipe.head.sources[0][0] == own
    assert not any(recipe.scales for recipe in found.values())


@pytest.mark.parametrize("depth", range(1, 13))
def test_an_upscaled_model_has_every_layer_and_about_half_as_many_again(depth: int) -> None:
    [(_, recipe)] = hand_routes((("a", depth),))
    layers = [i for _, i in route(recipe)]
    assert set(layers) == set(range(depth))
    assert abs(len(layers) - 1.5 * depth) <= 1
    assert sum(b != a + 1 for a, b in itertools.pairwise(layers)) == 1


def test_a_hand_route_of_a_merge_carries_it() -> None:
    stage = ("merged", merged())
    [(label, recipe)] = hand_routes((("merged", 4),), stage=stage, out_dtype="float32")
    assert (label, recipe.stages, recipe.base, recipe.out_dtype) == (
        "merged up-scaled",
        (stage,),
        stage[1].base,
        "float32",
    )
    assert route(recipe) == [("merged", i) for i in (0, 1, 2, 1, 2, 3)]
