"""What a config.json says of each layer, and the changes of a stack of layers written into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.config_meanings import built_text_config
from evomerge.errors import CheckpointError
from evomerge.merging.routing.layer_config import ConfigChanges, LayerConfig, as_json, values_of


def layer_config_of_file(name: str, config: Mapping[str, Any], depth: int) -> LayerConfig:
    """Reads what a config.json says of its layers, with what transformers fills in where the file is silent.

    Args:
        name: What messages call the model.
        config: The config.json.
        depth: Number of layers.

    Returns:
        The config of the layers; the file's own values alone where transformers knows no such model.
    """
    text = config.get("text_config", config)
    built = built_text_config(config)
    if built is None:
        key = "n_layer" if "n_layer" in text else "num_hidden_layers"
        return LayerConfig(name, text, depth, key, {})
    key = built.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return LayerConfig(name, {**values_of(built), **_stated(text)}, depth, key, {})


def write_changes_to_file(config: dict[str, Any], changes: ConfigChanges) -> None:
    """Puts the values of a stack of layers into a config.json.

    What transformers fills in alike by itself stays out.

    Args:
        config: The config.json; changed in place.
        changes: The changes.

    Raises:
        CheckpointError: Neither a layer's own model nor the config's has a value for an entry of a list.
    """
    text = config.get("text_config", config)
    for key, listed in changes.lists.items():
        if None in listed and None not in (text.get(key) or ()):
            raise CheckpointError(
                f"the config says {key} of each layer and nothing of layer {listed.index(None)} of the "
                "stack; leave that layer out"
            )
    stated = _stated(text)
    text.update({key: as_json(value) for key, value in changes.values.items() if key in stated})
    silent = {key: as_json(value) for key, value in changes.values.items() if key not in stated}
    built = built_text_config(config) if silent else None
    if built is not None:
        for key, value in silent.items():
            if as_json(getattr(built, key, None)) != value:
                text[key] = value


def _stated(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says: a null is filled in as if the key were not there."""
    return {key: value for key, value in text.items() if value is not None}
