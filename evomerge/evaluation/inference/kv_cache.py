"""A model's cache of past tokens: made, and forked over a batch without changing the original.

An attention layer of transformers binds new keys and values at every update (`keys = cat(keys, new)`) and
writes in place nowhere, so that a fork is a shallow copy of the layer with its tensors expanded (stride 0).
Recurrent layers write their states in place, so that each fork gets states of its own.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, nn

from evomerge.errors import CandidateError


def new_cache(model: nn.Module, *, windowed: bool = True) -> Any:
    """Makes an empty cache.

    Args:
        model: A transformers model.
        windowed: True for layers with a window or a state as the model has them; False for full length in
            every layer.

    Returns:
        A transformers `DynamicCache`.
    """
    from transformers import DynamicCache

    config: Any = model.config
    return DynamicCache(config=config) if windowed else DynamicCache()


def cache_argument(model: nn.Module) -> str | None:
    """Returns what a model's forward calls its cache.

    It is read from the signature: a wrong name would vanish in **kwargs, and the prefix be ignored silently.

    Args:
        model: A transformers model.

    Returns:
        'past_key_values' or 'cache_params'; None if it takes no cache that can be forked.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def takes_positions(model: nn.Module) -> bool:
    """Returns whether a model's forward has `position_ids`.

    If so they are always given, since some models miscount.

    Args:
        model: A transformers model.

    Returns:
        True if it has.
    """
    return "position_ids" in inspect.signature(model.forward).parameters


def fork(cache: Any, *, rows: int = 1, index: Tensor | None = None) -> Any:
    """Copies a cache over other rows. The original stays as it is.

    Args:
        cache: A transformers cache.
        rows: If `index` is None: number of rows that a cache of one row is spread to.
        index: [n] rows of the cache that the copy's rows continue.

    Returns:
        The copy.
    """
    forked = copy.copy(cache)
    forked.layers = [_fork_layer(layer, rows, index) for layer in cache.layers]
    return forked


def carries_gradients(model: nn.Module) -> bool:
    """Returns whether `detached` takes the caches of a model.

    Args:
        model: A transformers model.

    Returns:
        True if no layer keeps a recurrent state.
    """
    return not any(
        isinstance(value, dict) for layer in new_cache(model).layers for value in vars(layer).values()
    )


def detached(cache: Any) -> Any:
    """Copies a cache so that gradients by its keys and values end in the copy.

    Args:
        cache: A transformers cache with a graph.

    Returns:
        The copy; its keys and values are leaves that require gradients.

    Raises:
        CandidateError: A layer holds recurrent states.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        tensors = [
            name for name, value in vars(layer).items() if isinstance(value, Tensor) and value.dim() >= 2
        ]
        if set(tensors) != {"keys", "values"} or any(isinstance(v, dict) and v for v in vars(layer).values()):
            raise CandidateError(
                "a cache with recurrent states carries no gradients; score this model without shared prefixes"
            )
        layer.keys = layer.keys.detach().requires_grad_(True)
        layer.values = layer.values.detach().requires_grad_(True)
    return new


def key_value_pairs(cache: Any, leaves: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs the keys and values of a cache with those of its detached copy.

    Args:
        cache: A transformers cache.
        leaves: Result of `detached` for it.

    Returns:
        (tensor of the cache, leaf of the copy) pairs.
    """
    return [
        (getattr(own, name), getattr(leaf, name))
        for own, leaf in zip(cache.layers, leaves.layers, strict=True)
        for name in ("keys", "values")
    ]


def _fork_layer(layer: Any, rows: int, index: Tensor | None) -> Any:
    new = copy.copy(layer)
    for name, value in list(vars(new).items()):
        if isinstance(value, Tensor) and value.dim() >= 2 and value.numel():
            setattr(new, name, value.expand(rows, *value.shape[1:]) if index is None else _rows(value, index))
        elif isinstance(value, dict):
            setattr(new, name, {key: _fork_state(item, rows, index) for key, item in value.items()})
    return new


def _fork_state(state: Any, rows: int, index: Tensor | None) -> Any:
    """A recurrent state of its own for each row."""
    if not isinstance(state, Tensor) or state.dim() < 2:
        return state
    return _rows(state, index) if index is not None else state.expand(rows, *state.shape[1:]).clone()


def _rows(value: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor, which may be on another card than the index."""
    return value.index_select(0, index.to(value.device))
