"""The config.json of a merged model: the base's, with the recipe's depth, layers, vocabulary and type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints import Parent
from evomerge.merging.routing import file_config, layer_config
from evomerge.merging.routing.layer_config import ConfigChanges
from evomerge.merging.tensor_plan import layer_index
from evomerge.merging.vocabulary.alignment import Vocabulary
from evomerge.recipes import Recipe


def merged_config(
    recipe: Recipe, parents: Mapping[str, Parent], vocabulary: Vocabulary | None
) -> dict[str, Any]:
    """The config.json of the model that a recipe makes.

    Args:
        recipe: The recipe.
        parents: Name -> parent, for every model that the recipe reads, intermediate merges included.
        vocabulary: The output's vocabulary, None if the recipe keeps the base's rows.

    Returns:
        A new config; everything that the recipe does not decide is the base's.

    Raises:
        CheckpointError: The models' configs say different things of their layers that cannot be brought
            together.
    """
    donor = parents[recipe.base]
    config = vocabulary.config(donor.config) if vocabulary else copy.deepcopy(donor.config)
    text = config.get("text_config", config)
    text["n_layer" if "n_layer" in text else "num_hidden_layers"] = len(recipe.layers)
    changes = layer_changes(recipe, parents)
    if changes is not None:
        file_config.write_changes_to_file(config, changes)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = recipe.out_dtype
    return config


def layer_changes(recipe: Recipe, parents: Mapping[str, Parent]) -> ConfigChanges | None:
    """What a recipe's layers change in the text config of its base.

    A layer that is taken over has the values of its own model. A mixed one has the base's, at the number of
    its first source, as where it is scored; its first source's where the base is not as deep.

    Args:
        recipe: The recipe.
        parents: Name -> parent, for every model that the recipe reads, intermediate merges included.

    Returns:
        The changes, None if there are none.

    Raises:
        RecipeError: A source of a layer names no layer.
        RouteError: A source names a layer that its model does not have.
    """
    depth = parents[recipe.base].layout.num_layers
    origins = []
    for mix in recipe.layers:
        model, number = mix.sources[0]
        layer = layer_index(number)
        is_own = mix.passed is not None or layer >= depth
        origins.append((model if is_own else recipe.base, layer))
    if origins == [(recipe.base, i) for i in range(depth)]:
        return None
    names = dict.fromkeys([recipe.base, *(model for model, _ in origins)])
    configs = {
        name: file_config.layer_config_of_file(name, parents[name].config, parents[name].layout.num_layers)
        for name in names
    }
    base = configs[recipe.base]
    changes = layer_config.gather(base, [(configs[model], layer) for model, layer in origins])
    return None if layer_config.is_unchanged(base, changes) else changes
