"""Relaxed routes: which model fills each depth, by gradient, before a stage of routes evolves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.checkpoints import Parent
from evomerge.config.stage_schema import StageConfig
from evomerge.errors import ConfigError, EvomergeError
from evomerge.merging.merge import Merge
from evomerge.recipes import Recipe
from evomerge.search import LearnedOpening, Relaxation
from evomerge.spaces.routes.layer_pool import LayerPool
from evomerge.spaces.routes.relaxation import RelaxedRouteSpace

_STEPS, _ITEMS, _RATE = 24, 30, 0.3
_SHARD = 64  # items that one worker scores with their slopes at once
_REMEDY = "leave it out of routes.models, or leave out method: relaxed"


def make_relaxation(
    stage: StageConfig, base: str, parents: Mapping[str, Parent], pool: LayerPool, *, any_outer: bool
) -> Relaxation:
    """The relaxation of a stage of routes.

    Args:
        stage: Its entry in the search file.
        base: Name of the base.
        parents: The models, open.
        pool: The layers of its routes.
        any_outer: Whether embeddings and head may be of any model; else they are of `pool.begin`.

    Returns:
        What is descended, and how its end becomes a route.

    Raises:
        ConfigError: See `check_relaxable`.
    """
    names = tuple(name for name, _ in pool.models)
    layout = parents[base].layout
    space = RelaxedRouteSpace(
        base=base,
        models=names,
        depth=layout.num_layers,
        places={name: layout.place(name).layer for name in parents[base].tensors},
        outer=None if any_outer and len(names) > 1 else pool.begin,
        stage=pool.stage,
        out_dtype=pool.out_dtype,
    )
    steps = stage.steps or _STEPS

    def space_at(step: int, genome: Sequence[float]) -> RelaxedRouteSpace:
        return space.at_step(step, steps, genome)

    def rounded(genome: Sequence[float]) -> Recipe:
        outer, layers = space.route(genome)
        return pool.recipe(layers, [1.0] * len(layers), outer)

    opening = LearnedOpening(
        space=space,
        steps=steps,
        rate=stage.rate or _RATE,
        items=stage.items or _ITEMS,
        shard=_SHARD,
        surrogate=stage.surrogate or "logprob",
        annealed=space_at,
        name="relaxed",
        summary="one for each depth and model",
    )
    return Relaxation(opening, rounded, "relaxed route")


def check_relaxable(
    base: str, names: Sequence[str], parents: Mapping[str, Parent], bounds: tuple[int, int] | None
) -> None:
    """Checks that the layers of models can be averaged as weights, from headers alone.

    Args:
        base: Name of the base.
        names: The models whose layers a route may take.
        parents: The models, open.
        bounds: Least and most layers of a route; None where they hold the base's depth in any case.

    Raises:
        ConfigError: A model has layers of another number or shape, or no route may be as deep as the base.
    """
    depth = parents[base].layout.num_layers
    if bounds is not None and not bounds[0] <= depth <= bounds[1]:
        raise ConfigError(
            f"method: relaxed ends at a route of the base's {depth} layers, and routes.layers are "
            f"{list(bounds)}; let them hold {depth}, or leave out method: relaxed"
        )
    for name in names:
        own = parents[name].layout.num_layers
        if own != depth:
            raise ConfigError(
                f"method: relaxed averages layers of all models as weights, and '{name}' has {own} layers "
                f"where the base '{base}' has {depth}; {_REMEDY}"
            )
        space = RelaxedRouteSpace(base, tuple(dict.fromkeys((base, name))), depth, places={})
        try:
            Merge(space.decode(space.start), parents)
        except EvomergeError as error:
            raise ConfigError(
                f"method: relaxed averages layers of all models as weights, and '{name}' does not fit the "
                f"base '{base}': {error}; {_REMEDY}"
            ) from error
