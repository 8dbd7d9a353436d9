"""What a config says of each layer, gathered along a route. Reads the config's own values; no table of architectures.

Each layer's values are those of the model that it comes from: in the config of a live route and in the config.json of a merge.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from evomerge.errors import CheckpointError, RouteError
from evomerge.merging.routing.decoder_layers import index_names, stack, text_config

_NOT_LAYERS = ("token_id", "architectures", "token_ids")
_INDEX_SETS = ("layer", "idxs", "indices", "indexes")
_LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Numbers of leading layers of another kind, in the words of transformers' configs."""
_LAST = ("moe_layer_end_index",)
"""Numbers of the last layer of a kind."""
_NUMBERS = (*_LEADING, *_LAST, "scale_depth")
_REFUSALS = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What a text config says of a stack of layers. name: of its model, for messages; values: of the config, by key; computed:
    lists with one value a layer that the config's class computes itself; depth_key: where the config holds the depth."""

    name: str
    values: Mapping[str, Any]
    depth: int
    depth_key: str
    computed: Mapping[str, list[Any]]

    def lists(self) -> dict[str, list[Any]]:
        """What the config lists of each layer: name -> one value a layer."""
        found = {
            k: list(v)
            for k, v in self.values.items()
            if isinstance(v, (list, tuple)) and len(v) == self.depth
        }
        return {k: v for k, v in found.items() if _of_layers(k, v, self.depth)} | {
            k: list(v) for k, v in self.computed.items()
        }

    def index_sets(self) -> dict[str, list[int]]:
        """Numbers of the layers that something holds for: name -> numbers, rising."""
        return {
            k: list(v)
            for k, v in self.values.items()
            if isinstance(v, (list, tuple)) and _is_index_set(k, v, self.depth)
        }


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
        return self.layer_config().lists()

    def index_sets(self) -> dict[str, list[int]]:
        """Numbers of the layers that something holds for: name -> numbers, rising."""
        return self.layer_config().index_sets()

    def layer_config(self) -> LayerConfig:
        """What the model's config says of its layers."""
        computed = {k: list(getattr(self.text, k)) for k in self.properties}
        return LayerConfig(
            type(self.model).__name__, _values(self.text), len(self.layers), self.depth_key, computed
        )


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
    return Source(
        model,
        path,
        layers,
        owner,
        text,
        index_names(list(layers)),
        key,
        names,
        _properties(text, len(layers)),
    )


def changes(shell: Source, hops: Sequence[tuple[Source, int]]) -> Changes:
    """What a route changes in the shell's text config. Raises RouteError for a layer that is not there."""
    configs = {id(home): home.layer_config() for home in (shell, *(home for home, _ in hops))}
    return gathered(configs[id(shell)], [(configs[id(home)], layer) for home, layer in hops])


def gathered(shell: LayerConfig, hops: Sequence[tuple[LayerConfig, int]]) -> Changes:
    """What a stack of layers changes in the shell's text config. Raises RouteError for a layer that is not there.

    Where a model's config lists nothing of its layers under a key of the shell's, the shell's own value at that number stays.
    """
    for home, layer in hops:
        if not 0 <= layer < home.depth:
            raise RouteError(
                f"layer {layer} of {home.name} was asked for; it has layers 0 to {home.depth - 1}"
            )
    tables = {id(home): (home.lists(), home.index_sets()) for home, _ in hops}
    lists: dict[str, list[Any]] = {}
    for key, own in shell.lists().items():
        said = [(tables[id(home)][0].get(key, own), layer) for home, layer in hops]
        lists[key] = [values_of[layer] if layer < len(values_of) else None for values_of, layer in said]
    values: dict[str, Any] = {}
    for key in shell.index_sets():
        values[key] = [i for i, (home, layer) in enumerate(hops) if layer in tables[id(home)][1].get(key, ())]
    for key in _LEADING:
        if isinstance(shell.values.get(key), int):
            inside = [layer < (home.values.get(key) or 0) for home, layer in hops]
            values[key] = next((i for i, is_in in enumerate(inside) if not is_in), len(hops))
    for key in _LAST:
        if isinstance(shell.values.get(key), int):
            inside = [layer <= home.values.get(key, -1) for home, layer in hops]
            values[key] = len(hops) - 1 - next((i for i, is_in in enumerate(reversed(inside)) if is_in), 0)
    ratio = len(hops) / shell.depth
    if isinstance(
        scale := shell.values.get("scale_depth"), (int, float)
    ):  # MiniCPM divides it by the root of the depth
        values["scale_depth"] = scale * ratio**0.5
    values[shell.depth_key] = len(hops)
    kept = {
        k: v if isinstance(shell.values[k], list) else tuple(v)
        for k, v in lists.items()
        if k not in shell.computed
    }
    return Changes(values | kept, lists, {k: lists[k] for k in shell.computed})


def of_file(name: str, config: Mapping[str, Any], depth: int) -> LayerConfig:
    """What a config.json says of its layers, with what transformers fills in where the file is silent."""
    text = config.get("text_config", config)
    key = "n_layer" if "n_layer" in text else "num_hidden_layers"
    built = _built(config)
    if built is None:
        return LayerConfig(name, text, depth, key, {})
    key = built.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return LayerConfig(name, {**_values(built), **_stated(text)}, depth, key, {})


def write_file(config: dict[str, Any], changed: Changes) -> None:
    """Puts the values of a stack of layers into a config.json. What transformers fills in alike by itself stays out.

    Raises CheckpointError for a list that neither a layer's own model nor the config's has a value for.
    """
    text = config.get("text_config", config)
    for key, listed in changed.lists.items():
        if None in listed and None not in (text.get(key) or ()):
            raise CheckpointError(
                f"the config says {key} of each layer and nothing of layer {listed.index(None)} of the stack; leave that layer out"
            )
    text.update({k: _json(v) for k, v in changed.values.items() if k in _stated(text)})
    silent = {k: v for k, v in changed.values.items() if k not in _stated(text)}
    built = _built(config) if silent else None
    text.update(
        {
            k: _json(v)
            for k, v in silent.items()
            if built is not None and _json(getattr(built, k, None)) != _json(v)
        }
    )


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
        text.__class__ = type(
            kind.__name__, (kind,), {**body, "_evomerge_written": kind, "__module__": kind.__module__}
        )


def signature(model: nn.Module, layer: int) -> str:
    """Digest of a layer's kind: the classes, shapes and scalar attributes in it and what the config says of it alone.

    Equal for layers that can stand in for each other; their weights are not looked at.
    """
    home = source(model)
    if not 0 <= layer < len(home.layers):
        raise RouteError(
            f"layer {layer} of {type(model).__name__} was asked for; it has layers 0 to {len(home.layers) - 1}"
        )
    said = {key: str(values[layer]) for key, values in home.lists().items()} | {
        key: str(layer in own) for key, own in home.index_sets().items()
    }
    parts = {
        f"{path}:{name}": str(value)
        for (path, name), value in fingerprint(home.layers[layer], home.index_names).items()
    }
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
    return (
        all(map(_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, (int, float, str))
    )


def is_unchanged(shell: LayerConfig, changed: Changes) -> bool:
    """Whether the shell's config says already what a stack of layers would change in it."""
    return all(_json(shell.values.get(key)) == _json(value) for key, value in changed.values.items())


def _values(text: Any) -> dict[str, Any]:
    """The values of a text config, under the names by which they are looked up."""
    return {**vars(text), **{key: getattr(text, key) for key in _NUMBERS if hasattr(text, key)}}


def _stated(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says: a null is filled in as if the key were not there."""
    return {key: value for key, value in text.items() if value is not None}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _properties(text: Any, depth: int) -> tuple[str, ...]:
    """Names of the lists with one value a layer that a config's class computes itself."""
    names = sorted(
        {
            name
            for kind in type(text).__mro__
            for name, value in vars(kind).items()
            if isinstance(value, property)
        }
    )
    found = ((name, getattr(text, name, None)) for name in names if "layer" in name)
    return tuple(name for name, value in found if isinstance(value, (list, tuple)) and len(value) == depth)


def _built(config: Mapping[str, Any]) -> Any:
    """The text config that transformers makes of a file; None where it knows no such model or refuses the values."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
        return made.get_text_config(decoder=True)
    except (StrictDataclassError, *_REFUSALS):
        return None


def _of_layers(key: str, values: Sequence[Any], depth: int) -> bool:
    return not any(word in key for word in _NOT_LAYERS) and not _is_index_set(key, values, depth)


def _is_index_set(key: str, values: Sequence[Any], depth: int) -> bool:
    """Rising numbers of layers. A list as long as the stack is one only if it is 0, 1, 2, ...; shorter ones are told by their name."""
    if not all(type(v) is int and 0 <= v < depth for v in values) or any(word in key for word in _NOT_LAYERS):
        return False
    rising = all(a < b for a, b in pairwise(values))
    return (
        rising
        and any(word in key for word in _INDEX_SETS)
        and (len(values) != depth or list(values) == list(range(depth)))
    )
