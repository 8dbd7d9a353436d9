"""A recipe of mergekit -> wishes for a search that begins at it and has it to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from evomerge import _yaml
from evomerge.checkpoints import Parent, open_parent, stored_dtype
from evomerge.errors import ConfigError
from evomerge.launch.new_search.wishes import Wishes, named_models
from evomerge.methods import METHODS, Method
from evomerge.recipes import Filtered, Mix, PerRow, Recipe, mergekit_yaml
from evomerge.recipes.file_kinds import other_file

LABEL = "given recipe"
"""What the recipe is called in the search file and in tables."""
_MOST_GROUPS = 12  # layer groups that are taken over from a recipe's steps
_ROOM = 0.5  # what a range reaches beyond the recipe's values, of the method's range
_MARGIN = 0.02


def read_recipe(file: Path) -> Wishes:
    """Reads a recipe of mergekit.

    Args:
        file: Its YAML, of any form that `evomerge merge` takes.

    Returns:
        The wishes: its models, method and values, with what cannot be carried over in `notes`.

    Raises:
        ConfigError: It is no recipe; says where.
        CheckpointError: A model cannot be opened.
    """
    parents: dict[str, Parent] = {}

    def parent(reference: str) -> Parent:
        if reference not in parents:
            parents[reference] = open_parent(reference)
        return parents[reference]

    documents = _yaml.read_all(file)
    other = other_file(documents[0].data, "recipe")
    if other is not None:
        raise ConfigError(f"{documents[0].where()} {other}")
    notes: list[str] = []
    recipe = mergekit_yaml.load(
        documents,
        lambda name: parent(name).layout.num_layers,
        lambda name: stored_dtype(parent(name)),
        warn=lambda sentence: notes.append(f"{sentence} (in mergekit neither)"),
    )
    depth = parent(recipe.root_base).layout.num_layers
    if recipe.is_route({name: found.layout.num_layers for name, found in parents.items()}):
        return _route(recipe, file, notes)
    return _weights(recipe, file, depth, notes)


def _weights(recipe: Recipe, file: Path, depth: int, notes: list[str]) -> Wishes:
    """A search over the weights of a merge of whole models."""
    notes += _unheld(recipe)
    method, mixes = _method(recipe, notes)
    references = list(dict.fromkeys([recipe.root_base, *recipe.models]))
    models = named_models(references)
    names = {reference: name for name, reference in models.items()}
    space: dict[str, Any] = {}
    reasons: dict[tuple[str | int, ...], str] = {}
    if mixes:
        groups = _groups(recipe.layers)
        if groups is not None and len(groups) > 1:
            space["groups"] = groups
            reasons["space", "groups"] = "Sizes of the layer groups from the bottom, the recipe's own steps."
        elif groups is None:
            notes.append(
                "the recipe's values change from layer to layer: the search's start has those of each layer "
                "group's first layer, and the recipe itself is scored as it is"
            )
        parameters, told = _parameters(METHODS[method], mixes)
        if parameters:
            space["parameters"] = parameters
            reasons |= {("space", "parameters", name): sentence for name, sentence in told.items()}
    ordered = _in_order(recipe, method, models, names)
    reasons["hand_recipes",] = "The recipe that was given: a hand recipe to beat, scored before the search."
    reasons["search", "start"] = "The search begins at the given recipe, as near as its space can hold it."
    blocks: dict[str, Any] = {"hand_recipes": {LABEL: str(file.absolute())}, "space": space}
    if mixes and not recipe.stages:
        blocks["search"] = {"start": LABEL}
    return Wishes(
        models=ordered,
        tasks=(),
        base=names[recipe.root_base],
        method=method,
        blocks=blocks,
        reasons=reasons,
        notes=tuple(notes),
    )


def _route(recipe: Recipe, file: Path, notes: list[str]) -> Wishes:
    """A search of routes that begins with a stack of layers."""
    notes += _unheld(recipe)
    models = named_models(dict.fromkeys([recipe.base, *recipe.models]))
    if len(models) < 2:
        raise ConfigError(f"{file} stacks layers of one model; a search takes two models or more")
    is_plain = all(mix.passed is not None for mix in recipe.mixes) and not recipe.stages
    routes: dict[str, Any] = {}
    if is_plain:
        routes["stacks"] = [str(file.absolute())]
    else:
        notes.append("layers that are merged or scaled in a stack: the search of routes begins without it")
    return Wishes(
        models=models,
        tasks=(),
        base=next(iter(models)),
        method="task_arithmetic",
        blocks={"stages": [{"stage": "routes"}], **({"routes": routes} if routes else {})},
        reasons={
            ("stages",): "The recipe stacks layers: routes of layers are searched, not weights.",
            ("routes",): "The recipe that was given: a stack to begin with and to beat.",
            ("method",): "Of searches of weights; a search of routes does not use it.",
        },
        notes=tuple(notes),
    )


def _unheld(recipe: Recipe) -> list[str]:
    """What a recipe says beside its merges and a search does not do."""
    notes = []
    if recipe.tokenizer is not None:
        notes.append(
            "tokenizer: parents keep the base's tokens in a search; one with other tokens is refused with "
            "the recipe that brings it to them"
        )
    if recipe.chat_template is not None:
        notes.append("chat_template: exports have the base's; set it in the exported recipe.yaml")
    if recipe.out_dtype != "bfloat16":
        notes.append(f"out_dtype {recipe.out_dtype}: candidates are bfloat16 unless out_dtype is set here")
    return notes


def _method(recipe: Recipe, notes: list[str]) -> tuple[str, tuple[Mix, ...]]:
    """(the search's method, the mixes that have it; none where the recipe is of another kind)."""
    names = dict.fromkeys(mix.method for mix in recipe.layers)
    stages = {name for name, _ in recipe.stages}
    reads = {model for mix in recipe.mixes for model in mix.models}
    if len(names) > 1 or stages & reads:
        why = "merges of merges" if stages & reads else f"methods {', '.join(names)} in one recipe"
        notes.append(f"{why}: a search has one method over its models, task_arithmetic here")
        return "task_arithmetic", ()
    return next(iter(names)), recipe.layers


def _groups(layers: Sequence[Mix]) -> list[int] | None:
    """Sizes of runs of layers with equal values; None where they are too many."""
    sizes = [len(list(run)) for _, run in groupby(layers, key=lambda mix: mix.params)]
    return sizes if len(sizes) <= _MOST_GROUPS else None


def _parameters(method: Method, mixes: Sequence[Mix]) -> tuple[dict[str, Any], dict[str, str]]:
    """(ranges around the recipe's values and numbers that stay as they are, what stands above them)."""
    parameters: dict[str, Any] = {}
    told: dict[str, str] = {}
    for param in method.params:
        values = sorted({v for mix in mixes for v in _numbers(dict(mix.params).get(param.name))})
        if not values:
            continue
        if param.searched:
            room = _ROOM * (param.high - param.low)
            low = max(param.hard_low, min(param.low, values[0] - room * (values[0] < param.low)))
            high = min(param.hard_high, max(param.high, values[-1] + room * (values[-1] > param.high)))
            margin = _MARGIN * (high - low)
            middle = sum(values) / len(values)
            start = min(max(middle, low + margin), high - margin)
            parameters[param.name] = {"low": low, "high": high, "start": round(start, 4)}
            shown = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
            told[param.name] = f"{shown} in the recipe."
        elif len(values) == 1 and values[0] != param.default:
            parameters[param.name] = bool(values[0]) if param.flag else values[0]
            told[param.name] = "As in the recipe."
    return parameters, told


def _numbers(value: Any) -> list[float]:
    """All numbers of a parameter's value."""
    if value is None:
        return []
    if isinstance(value, tuple):
        return [number for entry in value for number in _numbers(entry)]
    if isinstance(value, Filtered):
        return [float(number) for _, number in value.cases]
    if isinstance(value, PerRow):
        return list(value.numbers)
    return [float(value)]


def _in_order(
    recipe: Recipe, method: str, models: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, str]:
    """The models in the order of the recipe's sources, the base first unless it is one of them."""
    base = names[recipe.root_base]
    sources = [names[model] for model, _ in recipe.layers[0].sources if model in names]
    ordered = dict.fromkeys([*([] if base in sources else [base]), *sources, *models])
    return {name: models[name] for name in ordered}
