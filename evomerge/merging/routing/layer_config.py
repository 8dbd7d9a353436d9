"""What a config says of each layer, gathered along a stack of layers. Reads the config's own values.

Each layer's values are those of the model that it comes from: in the config of a live route and in the
config.json of a merge. No table of architectures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evomerge.errors import RouteError

_NOT_LAYERS = ("token_id", "architectures", "token_ids")
_INDEX_SETS = ("layer", "idxs", "indices", "indexes")
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Numbers of leading layers of another kind, in the words of transformers' configs."""
_LAST = ("moe_layer_end_index",)
"""Numbers of the last layer of a kind."""
_NUMBERS = (*LEADING, *_LAST, "scale_depth")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What a text config says of a stack of layers.

    Attributes:
        name: What messages call its model.
        values: The config's values by key.
        depth: Number of layers.
        depth_key: The key under which the config holds the depth.
        computed: Lists with one value a layer that the config's class computes itself.
    """

    name: str
    values: Mapping[str, Any]
    depth: int
    depth_key: str
    computed: Mapping[str, list[Any]]

    def lists(self) -> dict[str, list[Any]]:
        """What the config lists of each layer: key -> one value a layer."""
        lists = {
            key: list(value)
            for key, value in self.values.items()
            if isinstance(value, (list, tuple)) and len(value) == self.depth
        }
        of_layers = {key: value for key, value in lists.items() if _is_of_layers(key, value, self.depth)}
        return of_layers | {key: list(value) for key, value in self.computed.items()}

    def index_sets(self) -> dict[str, list[int]]:
        """Numbers of the layers that something holds for: key -> numbers, rising."""
        return {
            key: list(value)
            for key, value in self.values.items()
            if isinstance(value, (list, tuple)) and _is_index_set(key, value, self.depth)
        }


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """What a stack of layers changes in the text config that it gets.

    Attributes:
        values: Key -> new value.
        lists: Key -> one value a layer, for all lists of the config.
        computed: Those of the lists that the config's class computes itself.
    """

    values: Mapping[str, Any]
    lists: Mapping[str, list[Any]]
    computed: Mapping[str, list[Any]]


def gather(shell: LayerConfig, layers: Sequence[tuple[LayerConfig, int]]) -> ConfigChanges:
    """Gathers what a stack of layers changes in the text config that it gets.

    Where a model's config lists nothing of its layers under a key of the shell's, the shell's own value at
    that number stays.

    Args:
        shell: The config that the stack gets.
        layers: For each layer of the stack, the config of the model that it comes from and its number there.

    Returns:
        The changes.

    Raises:
        RouteError: A layer is not there.
    """
    for origin, layer in layers:
        if not 0 <= layer < origin.depth:
            raise RouteError(
                f"layer {layer} of {origin.name} was asked for; it has layers 0 to {origin.depth - 1}"
            )
    lists = _gathered_lists(shell, layers)
    values: dict[str, Any] = _gathered_index_sets(shell, layers)
    for key in LEADING:
        if isinstance(shell.values.get(key), int):
            inside = [layer < (origin.values.get(key) or 0) for origin, layer in layers]
            values[key] = inside.index(False) if False in inside else len(layers)
    for key in _LAST:
        if isinstance(shell.values.get(key), int):
            inside = [layer <= origin.values.get(key, -1) for origin, layer in layers]
            trailing = inside[::-1].index(True) if True in inside else 0
            values[key] = len(layers) - 1 - trailing
    scale = shell.values.get("scale_depth")
    if isinstance(scale, (int, float)):  # MiniCPM divides it by the root of the depth
        values["scale_depth"] = scale * (len(layers) / shell.depth) ** 0.5
    values[shell.depth_key] = len(layers)
    for key, listed in lists.items():
        if key not in shell.computed:
            values[key] = listed if isinstance(shell.values[key], list) else tuple(listed)
    return ConfigChanges(values, lists, {key: lists[key] for key in shell.computed})


def is_unchanged(shell: LayerConfig, changes: ConfigChanges) -> bool:
    """Whether a config says already what a stack of layers would change in it.

    Args:
        shell: The config.
        changes: The changes.

    Returns:
        True if every value is equal, a tuple to a list of the same items too.
    """
    return all(as_json(shell.values.get(key)) == as_json(value) for key, value in changes.values.items())


def values_of(text: Any) -> dict[str, Any]:
    """The values of a text config of transformers.

    Args:
        text: The config.

    Returns:
        Its attributes by name, and the numbers that `gather` looks for under transformers' names of them.
    """
    return {**vars(text), **{key: getattr(text, key) for key in _NUMBERS if hasattr(text, key)}}


def as_json(value: Any) -> Any:
    """A value of a config as JSON gives it back.

    Args:
        value: The value.

    Returns:
        A list for a tuple, anything else as it is.
    """
    return list(value) if isinstance(value, tuple) else value


def _gathered_lists(shell: LayerConfig, layers: Sequence[tuple[LayerConfig, int]]) -> dict[str, list[Any]]:
    """Key of the shell's lists -> one value a layer; None for a layer that no list reaches."""
    lists_of = {id(origin): origin.lists() for origin, _ in layers}
    gathered: dict[str, list[Any]] = {}
    for key, own in shell.lists().items():
        gathered[key] = []
        for origin, layer in layers:
            listed = lists_of[id(origin)].get(key, own)
            gathered[key].append(listed[layer] if layer < len(listed) else None)
    return gathered


def _gathered_index_sets(shell: LayerConfig, layers: Sequence[tuple[LayerConfig, int]]) -> dict[str, Any]:
    """Key of the shell's index sets -> the stack's layers that are in their own model's set."""
    sets_of = {id(origin): origin.index_sets() for origin, _ in layers}
    return {
        key: [i for i, (origin, layer) in enumerate(layers) if layer in sets_of[id(origin)].get(key, ())]
        for key in shell.index_sets()
    }


def _is_of_layers(key: str, values: Sequence[Any], depth: int) -> bool:
    return not any(word in key for word in _NOT_LAYERS) and not _is_index_set(key, values, depth)


def _is_index_set(key: str, values: Sequence[Any], depth: int) -> bool:
    """Whether a list holds rising numbers of layers.

    A list as long as the stack does only if it is 0, 1, 2, ...; shorter ones are recognised by their name.
    """
    if not all(type(value) is int and 0 <= value < depth for value in values):
        return False
    if any(word in key for word in _NOT_LAYERS):
        return False
    is_rising = all(a < b for a, b in pairwise(values))
    is_named = any(word in key for word in _INDEX_SETS)
    return is_rising and is_named and (len(values) != depth or list(values) == list(range(depth)))
