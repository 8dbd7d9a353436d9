"""The structure of modules without their weights: classes, scalar attributes and tensor shapes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from evomerge.errors import RouteError
from evomerge.merging.routing.layer_source import layer_source

_STATE = frozenset({"training", "gradient_checkpointing", "name_or_path"})
"""Attributes that say nothing of what a module computes."""


def fingerprint(module: nn.Module, ignored: frozenset[str] = frozenset()) -> dict[tuple[str, str], Any]:
    """The structure of a module.

    Args:
        module: The module; what a parametrization adds to it is left out.
        ignored: Names of attributes that do not count.

    Returns:
        (path inside the module, name) -> class, scalar attribute or tensor shape.
    """
    facts: dict[tuple[str, str], Any] = {}
    for path, part in module.named_modules():
        if ".parametrizations" in f".{path}":
            continue
        kind = type(part).__bases__[0] if "parametrizations" in part._modules else type(part)
        facts[path, "class"] = kind.__name__
        for name, value in vars(part).items():
            if not name.startswith("_") and name not in ignored and name not in _STATE and _is_plain(value):
                facts[path, name] = tuple(value) if isinstance(value, list) else value
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            facts[path, f"{name}.shape"] = None if tensor is None else tuple(tensor.shape)
        for name in part._modules.get("parametrizations") or ():
            facts[path, f"{name}.shape"] = tuple(part.parametrizations[name].original.shape)
    return facts


def signature(model: nn.Module, layer: int) -> str:
    """Digest of a layer's kind: classes, shapes and scalar attributes in it, and its entries in the config.

    Args:
        model: A live transformers model; its weights are not read.
        layer: Index of the layer.

    Returns:
        16 hexadecimal digits, equal for layers that can stand in for each other.

    Raises:
        RouteError: There is no such layer.
    """
    source = layer_source(model)
    if not 0 <= layer < len(source.layers):
        raise RouteError(
            f"layer {layer} of {type(model).__name__} was asked for; it has layers 0 to "
            f"{len(source.layers) - 1}"
        )
    config = source.layer_config()
    in_config = {key: str(values[layer]) for key, values in config.lists().items()}
    in_config |= {key: str(layer in numbers) for key, numbers in config.index_sets().items()}
    structure = {
        f"{path}:{name}": str(value)
        for (path, name), value in fingerprint(source.layers[layer], source.index_names).items()
    }
    text = json.dumps([in_config, structure], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str))
