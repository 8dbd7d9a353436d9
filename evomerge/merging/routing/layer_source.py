"""A live model as a place to take layers from, and the config of a route through such models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evomerge.merging.routing import computed_lists
from evomerge.merging.routing.decoder_layers import index_names, stack, text_config
from evomerge.merging.routing.layer_config import ConfigChanges, LayerConfig, gather, values_of


@dataclass(frozen=True, slots=True)
class LayerSource:
    """A live model whose layers are taken by routes. Made by `layer_source`.

    Attributes:
        model: The model.
        path: Dotted path of its stack.
        layers: The stack.
        owner: The module that holds the stack.
        text: Its text config.
        index_names: Names of the attributes in which layers keep their own number.
        depth_key: The key under which the text config holds the depth.
        depth_names: Names under which modules and configs hold the depth.
        properties: Names of the lists with one value a layer that the config's class computes itself.
    """

    model: nn.Module
    path: str
    layers: nn.ModuleList
    owner: nn.Module
    text: Any
    index_names: frozenset[str]
    depth_key: str
    depth_names: frozenset[str]
    properties: tuple[str, ...]

    @property
    def stack_name(self) -> str:
        """The stack's name inside its owner."""
        return self.path.rpartition(".")[2]

    def layer_config(self) -> LayerConfig:
        """What the model's config says of its layers."""
        computed = {name: list(getattr(self.text, name)) for name in self.properties}
        return LayerConfig(
            type(self.model).__name__, values_of(self.text), len(self.layers), self.depth_key, computed
        )


def layer_source(model: nn.Module) -> LayerSource:
    """Makes a place to take layers from of a model; walks through all its layers.

    Args:
        model: A live transformers model.

    Returns:
        The source.

    Raises:
        RouteError: The model has no stack.
    """
    path, layers = stack(model)
    text = text_config(model)
    depth_key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return LayerSource(
        model=model,
        path=path,
        layers=layers,
        owner=model.get_submodule(path.rpartition(".")[0]),
        text=text,
        index_names=index_names(list(layers)),
        depth_key=depth_key,
        depth_names=frozenset({depth_key, "num_hidden_layers", "num_layers", "n_layer", "n_layers"}),
        properties=_computed_lists(text, len(layers)),
    )


def route_changes(shell: LayerSource, layers: Sequence[tuple[LayerSource, int]]) -> ConfigChanges:
    """What a route changes in the shell's text config.

    Args:
        shell: The model whose embeddings, head and config the route gets.
        layers: For each layer of the route, the model that it comes from and its number there.

    Returns:
        The changes.

    Raises:
        RouteError: A layer is not there.
    """
    configs = {id(source): source.layer_config() for source in (shell, *(source for source, _ in layers))}
    return gather(configs[id(shell)], [(configs[id(source)], layer) for source, layer in layers])


def write_changes(text: Any, changes: ConfigChanges, overrule: bool) -> None:
    """Puts a route's values into a live config, past its validation, which would see them half changed.

    Args:
        text: The text config; changed in place.
        changes: The changes.
        overrule: Whether lists that the config's class computes are overruled where the route's differ; a
            file cannot say them.
    """
    computed_lists.restore_class(text)
    vars(text).update(changes.values)
    if overrule:
        differing = {
            key: values for key, values in changes.computed.items() if list(getattr(text, key)) != values
        }
        computed_lists.overrule(text, differing)


def _computed_lists(text: Any, depth: int) -> tuple[str, ...]:
    """Names of the lists with one value a layer that a config's class computes itself."""
    properties = {
        name
        for kind in type(text).__mro__
        for name, value in vars(kind).items()
        if isinstance(value, property) and "layer" in name
    }
    names = []
    for name in sorted(properties):
        value = getattr(text, name, None)
        if isinstance(value, (list, tuple)) and len(value) == depth:
            names.append(name)
    return tuple(names)
