"""What a config says of each layer, gathered along a route. Reads the config's own values; no table of architectures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from evomerge.errors import RouteError
from evomerge.stacks import index_names, stack, text_config

_NOT_LAYERS = ("token_id", "architectures", "token_ids")
_INDEX_SETS = ("layer", "idxs", "indices", "indexes")
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Numbers of leading layers of another kind, in the words of transformers' configs."""
_LAST = ("moe_layer_end_index",)
"""Numbers of the last layer of a kind."""


@dataclass(frozen=True, slots=True)
class Source:
    """A live model as a place to take layers from. path: of its stack; owner: the module that holds the stack."""

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

    def lists(self) -> dict[str, list[Any]]:
        """What the config lists of each layer: name -> one value a layer."""
        depth = len(self.layers)
        found = {k: list(v) for k, v in vars(self.text).items() if isinstance(v, (list, tuple)) and len(v) == depth and _of_layers(k, v, depth)}
        return found | {k: list(getattr(self.text, k)) for k in self.properties}

    def index_sets(self) -> dict[str, list[int]]:
        """Numbers of the layers that something holds for: name -> numbers, rising."""
        depth = len(self.layers)
        return {k: list(v) for k, v in vars(self.text).items() if isinstance(v, (list, tuple)) and _is_index_set(k, v, depth)}


@dataclass(frozen=True, slots=True)
class Changes:
    """A text config's values along a route. lists: one value a layer; computed: those that the config class computes itself."""

    values: Mapping[str, Any]
    lists: Mapping[str, list[Any]]
    computed: Mapping[str, list[Any]]


def source(model: nn.Module) -> Source:
    """A model as a place to take layers from; walks through all its layers. Raises RouteError for one without a stack."""
    path, layers = stack(model)
    text = text_config(model)
    owner = model.get_submodule(path.rpartition(".")[0])
    key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = frozenset({key, "num_hidden_layers", "num_layers", "n_layer", "n_layers"})
    depth = len(layers)
    properties = tuple(
        name
        for name in sorted(n for kind in type(text).__mro__ for n, v in vars(kind).items() if isinstance(v, property))
        if "layer" in name and isinstance(value := getattr(text, name, None), (list, tuple)) and len(value) == depth
    )
    return Source(model, path, layers, owner, text, index_names(list(layers)), key, names, tuple(dict.fromkeys(properties)))


def changes(shell: Source, hops: Sequence[tuple[Source, int]]) -> Changes:
    """What a route changes in the shell's text config. Raises RouteError for a layer that is not there."""
    for home, layer in hops:
        if not 0 <= layer < len(home.layers):
            raise RouteError(f"layer {layer} of {type(home.model).__name__} was asked for; it has layers 0 to {len(home.layers) - 1}")
    tables = {id(home): (home.lists(), home.index_sets()) for home, _ in hops}
    lists: dict[str, list[Any]] = {}
    for key, own in shell.lists().items():
        lists[key] = [tables[id(home)][0].get(key, own)[layer] if key in tables[id(home)][0] else None for home, layer in hops]
    values: dict[str, Any] = {}
    for key in shell.index_sets():
        values[key] = [i for i, (home, layer) in enumerate(hops) if layer in tables[id(home)][1].get(key, ())]
    for key in _LEADING:
        if isinstance(getattr(shell.text, key, None), int):
            inside = [layer < (getattr(home.text, key, 0) or 0) for home, layer in hops]
            values[key] = next((i for i, is_in in enumerate(inside) if not is_in), len(hops))
    for key in _LAST:
        if isinstance(getattr(shell.text, key, None), int):
            inside = [layer <= getattr(home.text, key, -1) for home, layer in hops]
            values[key] = len(hops) - 1 - next((i for i, is_in in enumerate(reversed(inside)) if is_in), 0)
    ratio = len(hops) / len(shell.layers)
    if isinstance(getattr(shell.text, "scale_depth", None), (int, float)):  # MiniCPM divides it by the root of the depth
        values["scale_depth"] = shell.text.scale_depth * ratio**0.5
    values[shell.depth_key] = len(hops)
    kept = {k: v if isinstance(getattr(shell.text, k), list) else tuple(v) for k, v in lists.items() if k not in shell.properties}
    return Changes(values | kept, lists, {k: lists[k] for k in shell.properties})


def write(text: Any, changed: Changes, computed: bool) -> None:
    """Puts a route's values into a config, past its validation, which would see them half changed.

    computed: whether lists that the config's class computes are overruled where the route's differ; a file cannot say them.
    """
    kind = getattr(type(text), "_evomerge_written", type(text))
    text.__class__ = kind
    vars(text).update(changed.values)
    overruled = {k: v for k, v in changed.computed.items() if list(getattr(text, k)) != v}
    if computed and overruled:
        body: dict[str, Any] = {k: property(lambda self, v=v: list(v)) for k, v in overruled.items()}  # type: ignore[misc]
        text.__class__ = type(kind.__name__, (kind,), {**body, "_evomerge_written": kind, "__module__": kind.__module__})


def signature(model: nn.Module, layer: int) -> str:
    """Digest of a layer's kind: the classes, shapes and scalar attributes in it and what the config says of it alone.

    Equal for layers that can stand in for each other; their weights are not looked at.
    """
    home = source(model)
    if not 0 <= layer < len(home.layers):
        raise RouteError(f"layer {layer} of {type(model).__name__} was asked for; it has layers 0 to {len(home.layers) - 1}")
    said = {key: str(values[layer]) for key, values in home.lists().items()} | {key: str(layer in own) for key, own in home.index_sets().items()}
    parts = {f"{path}:{name}": str(value) for (path, name), value in fingerprint(home.layers[layer], home.index_names).items()}
    return hashlib.sha256(json.dumps([said, parts], sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(module: nn.Module, ignored: frozenset[str] = frozenset()) -> dict[tuple[str, str], Any]:
    """The structure of a module: (path inside it, name) -> class, scalar attribute or tensor shape. ignored: names of attributes."""
    found: dict[tuple[str, str], Any] = {}
    for path, part in module.named_modules():
        if ".parametrizations" in f".{path}":
            continue
        kind = type(part).__bases__[0] if "parametrizations" in part._modules else type(part)
        found[path, "class"] = kind.__name__
        for name, value in vars(part).items():
            if not name.startswith("_") and name not in ignored and name not in _STATE and _plain(value):
                found[path, name] = tuple(value) if isinstance(value, list) else value
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            found[path, f"{name}.shape"] = None if tensor is None else tuple(tensor.shape)
        for name in part._modules.get("parametrizations") or ():
            found[path, f"{name}.shape"] = tuple(part.parametrizations[name].original.shape)
    return found


_STATE = frozenset({"training", "gradient_checkpointing", "name_or_path"})


def _plain(value: Any) -> bool:
    return all(map(_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (int, float, str))


def _of_layers(key: str, values: Sequence[Any], depth: int) -> bool:
    return not any(word in key for word in _NOT_LAYERS) and not _is_index_set(key, values, depth)


def _is_index_set(key: str, values: Sequence[Any], depth: int) -> bool:
    """Rising numbers of layers. A list as long as the stack is one only if it is 0, 1, 2, ...; shorter ones are told by their name."""
    if not all(type(v) is int and 0 <= v < depth for v in values) or any(word in key for word in _NOT_LAYERS):
        return False
    rising = all(a < b for a, b in pairwise(values))
    return rising and any(word in key for word in _INDEX_SETS) and (len(values) != depth or list(values) == list(range(depth)))
