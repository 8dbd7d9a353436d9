"""mergekit files that a search file names as hand recipes -> recipes of the search's models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Parent, stored_dtype
from evomerge.config import Config
from evomerge.errors import ConfigError
from evomerge.launch.model_names import search_names
from evomerge.recipes import Mix, Recipe, mergekit_yaml
from evomerge.recipes.recipe import Source
from evomerge.spaces import Baseline, MergeSpace, first_method

log = logging.getLogger(__name__)


def named_recipes(settings: Config, parents: Mapping[str, Parent]) -> list[Baseline]:
    """Reads the hand recipes of a search file.

    Args:
        settings: The settings of the search.
        parents: Its models, open.

    Returns:
        The recipes with their labels, in the order written.

    Raises:
        ConfigError: A file is missing, or merges another model than the search's.
        RecipeError: A file is no recipe; says where.
    """
    return [Baseline(label, "hand", read_named(label, settings, parents)) for label in settings.hand_recipes]


def read_named(label: str, settings: Config, parents: Mapping[str, Parent]) -> Recipe:
    """Reads one hand recipe of a search file.

    Args:
        label: Its label there.
        settings: The settings of the search.
        parents: Its models, open.

    Returns:
        The recipe with the search's names of its models, without a tokenizer or chat template of its own.

    Raises:
        ConfigError: The file is missing, or merges another model than the search's.
        RecipeError: It is no recipe; says where.
    """
    file = settings.hand_recipes[label]
    if not Path(file).is_file():
        raise ConfigError(f"hand_recipes: there is no file '{file}' for '{label}'; correct the path")
    name_of = search_names(
        settings,
        lambda reference: (
            f"hand_recipes: '{label}' merges '{reference}', which is not among the models of this "
            "search; add it, or leave the recipe out"
        ),
    )
    recipe = mergekit_yaml.load(
        _yaml.read_all(Path(file)),
        lambda reference: parents[name_of(reference)].layout.num_layers,
        lambda reference: stored_dtype(parents[name_of(reference)]),
        warn=log.warning,
    )
    stages = tuple((name, _renamed(stage, name_of, settings, recipe)) for name, stage in recipe.stages)
    renamed = replace(_renamed(recipe, name_of, settings, recipe), stages=stages)
    depths = {name: parent.layout.num_layers for name, parent in parents.items()}
    if not renamed.stages and not renamed.is_route(depths):
        renamed = replace(renamed, base=settings.base)  # whose files a merge of whole models has
    return renamed


def start_genome(
    label: str, space: MergeSpace, settings: Config, parents: Mapping[str, Parent]
) -> tuple[float, ...]:
    """The genome at which a search begins that starts at one of its hand recipes.

    Args:
        label: The recipe's label.
        space: The space of weights.
        settings: The settings of the search.
        parents: Its models, open.

    Returns:
        [len(axes)] genes; values beyond a bound are moved just inside, and a layer group has those of its
        first layer.

    Raises:
        ConfigError: The space cannot hold the recipe.
    """
    genome = space.encode(read_named(label, settings, parents))
    if genome is None:
        raise ConfigError(
            f"search.start: the space cannot hold the hand recipe '{label}': it takes whole models "
            f"{', '.join(first_method(space).models)} in this order by {' or '.join(settings.methods)}, with "
            "the fixed parameters of space.parameters; write search: {start: best}, or change the space"
        )
    return genome


def _renamed(recipe: Recipe, name_of: Callable[[str], str], settings: Config, whole: Recipe) -> Recipe:
    """A recipe with the search's names. whole: the recipe whose stages keep their names."""
    stages = {name for name, _ in whole.stages}

    def name(reference: str) -> str:
        return reference if reference in stages else name_of(reference)

    def source(given: Source) -> Source:
        return (name(given[0]), given[1])

    def mix(given: Mix) -> Mix:
        base = None if given.base is None else source(given.base)
        return replace(given, sources=tuple(map(source, given.sources)), base=base)

    return replace(
        recipe,
        base=name(recipe.base),
        layers=tuple(map(mix, recipe.layers)),
        embeddings=mix(recipe.embeddings),
        head=mix(recipe.head),
        out_dtype=settings.out_dtype,
        seed=settings.search.seed if recipe.seed else 0,
        tokenizer=None,
        chat_template=None,
        stages=(),
    )
