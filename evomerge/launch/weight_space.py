"""Configuration and parents -> the space of a merge method's parameters, or of several methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from evomerge import optimizers
from evomerge.checkpoints import COMPONENTS, Parent, equal_tensors
from evomerge.config import Config
from evomerge.errors import ConfigError
from evomerge.methods import Method, method
from evomerge.spaces import MergeSpace, MethodChoiceSpace, Range, WeightSpace
from evomerge.spaces.weights import EMBEDDINGS, HEAD

Cell = tuple[str, str | None]
"""(layer group, component), or (embeddings or head, None)."""


def is_diagonal(settings: Config, space: MergeSpace) -> bool:
    """Whether a first search of weights learns a diagonal covariance.

    Args:
        settings: The settings of the search, which may say so.
        space: Its space of weights.

    Returns:
        What the settings say, else whether the budget is too small for a full covariance.
    """
    return optimizers.is_diagonal(settings.search.diagonal, settings.budgets[0], len(space.axes))


def searched_unnamed(settings: Config) -> tuple[str, ...]:
    """The parameters that a search varies though its file does not name them and a recipe may leave them out.

    Args:
        settings: The settings of the search.

    Returns:
        Their names, as the methods declare them.
    """
    params = [param for name in settings.methods for param in method(name).params]
    named = settings.space.parameters
    found = (p.name for p in params if p.searched and not p.required and p.name not in named)
    return tuple(dict.fromkeys(found))


def make_space(
    settings: Config, parents: Mapping[str, Parent], searched: Collection[str] | None = None
) -> MergeSpace:
    """The space of weights of a configuration.

    Args:
        settings: The settings of the search.
        parents: Its models, open.
        searched: What a stored study searches of `searched_unnamed`; None for a new one, which searches all.

    Returns:
        The space, without the parameters that change nothing; with several methods one that chooses among
        them.

    Raises:
        ConfigError: If the sizes of the layer groups do not add up to the base's layers, or nothing is left
        to search.
    """
    base = parents[settings.base]
    sizes = settings.space.groups
    groups = tuple(sizes) if isinstance(sizes, tuple) else _divide(base.layout.num_layers, sizes)
    if sum(groups) != base.layout.num_layers:
        raise ConfigError(
            f"space.groups add up to {sum(groups)} layers, '{settings.base}' has {base.layout.num_layers}"
        )
    spaces = [
        _of_method(settings, method(name), groups, _segments(base), searched) for name in settings.methods
    ]
    if not settings.chooses_methods:
        return searchable(spaces[0], parents)
    with_base = [space for space in spaces if space.method.needs_base]
    dead = _dead(with_base[0], parents) if with_base else frozenset()  # which reads every tensor
    return MethodChoiceSpace(
        tuple(replace(space, dead=dead) if space.method.needs_base else space for space in spaces)
    )


def _of_method(
    settings: Config,
    merge_method: Method,
    groups: tuple[int, ...],
    segments: tuple[tuple[str, str], ...],
    searched: Collection[str] | None,
) -> WeightSpace:
    """The space of one method, with all its axes."""
    return WeightSpace(
        method=merge_method,
        base=settings.base,
        models=merge_method.searched_models(settings.base, settings.parents),
        groups=groups,
        components=settings.space.components,
        segments=segments,
        ranges=_ranges(settings, merge_method, searched),
        embeddings=settings.space.embeddings,
        head=settings.space.head,
        out_dtype=settings.out_dtype,
        seed=settings.search.seed,
        searchable=False,
    )


def searchable(space: WeightSpace, parents: Mapping[str, Parent]) -> WeightSpace:
    """A space of weights without the axes that change nothing.

    Args:
        space: The space with all its axes.
        parents: Its models, open.

    Returns:
        The space, ready to be searched.

    Raises:
        ConfigError: Nothing is left to search.
    """
    dead = _dead(space, parents) if space.method.needs_base else frozenset()
    return replace(space, dead=dead, searchable=True)


def _ranges(settings: Config, merge_method: Method, searched: Collection[str] | None) -> dict[str, Range]:
    """Parameter -> its range in the search file, the number that fixes it, or the method's own range."""
    count = len(merge_method.searched_models(settings.base, settings.parents))
    ranges = {}
    for param in merge_method.params:
        given = settings.space.parameters.get(param.name)
        if isinstance(given, bool | int | float):
            ranges[param.name] = Range(float(given), float(given), float(given))
        elif given is not None:
            ranges[param.name] = Range(given.low, given.high, given.start)
        elif param.searched and (param.required or searched is None or param.name in searched):
            ranges[param.name] = Range(param.low, param.high, param.start_for(count))
    return ranges


def _divide(layers: int, groups: int) -> tuple[int, ...]:
    """Sizes of `groups` groups that differ by at most one; the bottom ones are the larger."""
    groups = min(groups, layers)
    return tuple(layers // groups + (i < layers % groups) for i in range(groups))


def _segments(base: Parent) -> tuple[tuple[str, str], ...]:
    """(text, component) pairs: '.self_attn.' is attention, '.mlp.' is mlp; the rest is 'other'."""
    components: dict[str, str] = {}
    for layer in range(base.layout.num_layers):
        for suffix in base.layout.layer_suffixes(layer):
            component = base.layout.place(base.layout.layer_name(layer, suffix)).component
            if component != "other":
                components[f".{suffix.split('.', 1)[0]}."] = component
    return tuple(sorted(components.items(), key=lambda pair: (COMPONENTS.index(pair[1]), pair[0])))


def _dead(space: WeightSpace, parents: Mapping[str, Parent]) -> frozenset[tuple[str, str | None, str]]:
    """(group, component, model) where a parent equals the base: its parameters there change nothing."""
    cells: list[Cell] = [(EMBEDDINGS, None)]
    cells += [(group, component) for group, _ in space.spans() for component in space.components]
    cells.append((HEAD, None))
    dead = set()
    for name in space.models:
        alive = _alive(space, parents[space.base], parents[name])
        dead |= {(group, component, name) for group, component in cells if (group, component) not in alive}
    return frozenset(dead)


def _alive(space: WeightSpace, base: Parent, parent: Parent) -> set[Cell]:
    """The cells of the space with a tensor in which a parent differs from the base."""
    equal, spans = set(equal_tensors(base, parent)), space.spans()
    alive: set[Cell] = set()
    for tensor in base.tensors:
        place = base.layout.place(tensor)
        if tensor in equal or place.part == "tower":
            continue
        if place.layer is None:
            alive.add((EMBEDDINGS if place.part == "embeddings" else HEAD, None))
            continue
        group = next(name for name, span in spans if place.layer in span)
        if place.component in space.components:
            alive.add((group, place.component))
        else:  # a component without axes of its own takes the mean of all
            alive.update((group, component) for component in space.components)
    return alive
