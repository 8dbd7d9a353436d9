"""A mergekit passthrough file -> a recipe of a search's models, which a search of routes begins with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Parent, locate, stored_dtype
from evomerge.config import Config
from evomerge.errors import ConfigError
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
    name_of = _names(file, settings)
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


def _names(file: str, settings: Config) -> Callable[[str], str]:
    """What gives the search's name of a model that a file names, by that name or by where it is."""
    by_path = {str(locate(m.path, m.revision)): name for name, m in settings.models.items()}

    def name_of(reference: str) -> str:
        name = reference if reference in settings.models else by_path.get(str(locate(reference)))
        if name is None:
            raise ConfigError(
                f"routes.stacks: {file} takes layers of '{reference}', "
                "which is not among the models of this search"
            )
        return name

    return name_of
