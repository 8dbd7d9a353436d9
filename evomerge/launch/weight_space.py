"""Configuration and parents -> the space of weights and densities."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from evomerge import optimizers
from evomerge.checkpoints import COMPONENTS, Parent, equal_tensors
from evomerge.config import Config
from evomerge.errors import ConfigError
from evomerge.methods import method
from evomerge.spaces import Range, WeightSpace
from evomerge.spaces.weights import EMBEDDINGS, HEAD

log = logging.getLogger(__name__)


def is_diagonal(settings: Config, space: WeightSpace) -> bool:
    """Whether CMA-ES learns a diagonal covariance: as asked, else where the budget is too small for a full one."""
    search = settings.search
    return optimizers.is_diagonal(search.diagonal, settings.budgets[0], len(space.axes))


def make_space(settings: Config, parents: Mapping[str, Parent]) -> WeightSpace:
    """The search space of a configuration over open parents."""
    base = parents[settings.base]
    sizes = settings.space.groups
    groups = tuple(sizes) if isinstance(sizes, tuple) else _divide(base.layout.num_layers, sizes)
    if sum(groups) != base.layout.num_layers:
        raise ConfigError(
            f"space.groups add up to {sum(groups)} layers, '{settings.base}' has {base.layout.num_layers}"
        )
    rule = method(settings.method)
    ranges = {}
    for param in rule.params:
        given = settings.space.parameters.get(param.name)
        if isinstance(given, bool | int | float):
            ranges[param.name] = Range(float(given), float(given), float(given))
        elif given is not None:
            ranges[param.name] = Range(given.low, given.high, given.start)
        elif param.searched:
            ranges[param.name] = Range(param.low, param.high, param.start_for(len(settings.parents)))
    space = WeightSpace(
        method=rule,
        base=settings.base,
        models=settings.parents,
        groups=groups,
        components=settings.space.components,
        segments=_segments(base),
        ranges=ranges,
        embeddings=settings.space.embeddings,
        head=settings.space.head,
        out_dtype=settings.out_dtype,
        seed=settings.search.seed,
        searchable=False,
    )
    dead = _dead(space, parents) if rule.needs_base else frozenset()
    return WeightSpace(
        **{
            f: getattr(space, f)
            for f in space.__dataclass_fields__
            if f not in ("axes", "dead", "searchable")
        },
        dead=dead,
    )


def _divide(layers: int, groups: int) -> tuple[int, ...]:
    """Sizes of `groups` groups that differ by at most one; the bottom ones are the larger."""
    groups = min(groups, layers)
    return tuple(layers // groups + (i < layers % groups) for i in range(groups))


def _segments(base: Parent) -> tuple[tuple[str, str], ...]:
    """(text, component) pairs: '.self_attn.' is attention, '.mlp.' is mlp; the rest is 'other'."""
    found: dict[str, str] = {}
    for layer in range(base.layout.num_layers):
        for suffix in base.layout.layer_suffixes(layer):
            component = base.layout.place(base.layout.layer_name(layer, suffix)).component
            text = f".{suffix.split('.', 1)[0]}."
            if component != "other":
                found[text] = component
    return tuple(sorted(found.items(), key=lambda pair: (COMPONENTS.index(pair[1]), pair[0])))


def _dead(space: WeightSpace, parents: Mapping[str, Parent]) -> frozenset[tuple[str, str | None, str]]:
    """Cells of the space where a parent equals the base in every tensor: its parameters there change nothing."""
    base = parents[space.base]
    spans = space.spans()
    listed = set(space.components)
    dead = []
    for name in space.models:
        same = set(equal_tensors(base, parents[name]))
        alive: set[tuple[str, str | None]] = set()
        for tensor in base.tensors:
            if tensor in same:
                continue
            place = base.layout.place(tensor)
            if place.part == "tower":
                continue
            if place.layer is None:
                alive.add((EMBEDDINGS if place.part == "embeddings" else HEAD, None))
                continue
            group = next(g for g, span in spans if place.layer in span)
            alive.update((group, c) for c in ([place.component] if place.component in listed else listed))
        cells = [(EMBEDDINGS, None), *((g, c) for g, _ in spans for c in space.components), (HEAD, None)]
        dead += [(group, component, name) for group, component in cells if (group, component) not in alive]
    return frozenset(dead)
