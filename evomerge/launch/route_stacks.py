"""A mergekit passthrough file -> a recipe of a search's models, which a search of routes begins with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Parent, stored_dtype
from evomerge.config import Config
from evomerge.errors import ConfigError
from evomerge.launch.model_names import search_names
from evomerge.recipes import Mix, Recipe, mergekit_yaml

log = logging.getLogger(__name__)


def read_stack(file: str, settings: Config, parents: Mapping[str, Parent]) -> Recipe:
    """Reads a stack of layers that the search file names.

    Args:
        file: A mergekit YAML of the method passthrough.
        settings: The settings of the search.
        parents: Its models, open.

    Returns:
        The recipe, its models under their names in the search.

    Raises:
        ConfigError: If there is no such file, or it is no stack of the search's layers passed through as they
        are.
    """
    if not Path(file).is_file():
        raise ConfigError(f"routes.stacks: there is no file '{file}'; correct the path")
    name_of = search_names(
        settings,
        lambda reference: (
            f"routes.stacks: {file} takes layers of '{reference}', "
            "which is not among the models of this search"
        ),
    )
    stack = mergekit_yaml.load(
        _yaml.read_all(Path(file)),
        lambda reference: parents[name_of(reference)].layout.num_layers,
        lambda reference: stored_dtype(parents[name_of(reference)]),
        "float32",
        tensor_names=lambda reference: parents[name_of(reference)].tensors.keys(),
        warn=log.warning,
    )
    if any(mix.method != "passthrough" for mix in stack.mixes):
        raise ConfigError(
            f"routes.stacks: {file} is no stack of layers passed through; "
            "write it with merge_method: passthrough"
        )

    def renamed(mix: Mix) -> Mix:
        if any(value not in (1.0, (1.0,)) for _, value in mix.params):
            raise ConfigError(
                f"routes.stacks: {file} scales tensors; a route begins with layers as they are, "
                "so leave `scale` out"
            )
        return Mix(mix.method, tuple((name_of(model), layer) for model, layer in mix.sources))

    return Recipe(
        name_of(stack.base),
        tuple(renamed(mix) for mix in stack.layers),
        renamed(stack.embeddings),
        renamed(stack.head),
        out_dtype=settings.out_dtype,
    )
