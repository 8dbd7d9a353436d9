"""A model's cache of past tokens: made, and forked over a batch without touching the original.

An attention layer of transformers binds new keys and values at every update (`keys = cat(keys, new)`) and writes in place
nowhere, so that a fork is a shallow copy of the layer with its tensors expanded (stride 0). Recurrent layers write their
states in place, so that each fork gets states of its own.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, nn


def new_cache(model: nn.Module, *, windowed: bool = True) -> Any:
    """An empty cache. windowed: layers with a window or a state as the model has them; else full length in every layer."""
    from transformers import DynamicCache

    config: Any = model.config
    return DynamicCache(config=config) if windowed else DynamicCache()


def cache_argument(model: nn.Module) -> str | None:
    """What the model's forward calls its cache; None if it takes none that can be forked.

    Read from the signature: a wrong name vanishes in **kwargs, and the prefix would be ignored without a word.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has `position_ids`; if so they are always given: some count them wrongly by themselves."""
    return "position_ids" in inspect.signature(model.forward).parameters


def fork(cache: Any, *, rows: int = 1, index: Tensor | None = None) -> Any:
    """A cache over other rows; the original stays as it is. index [n]: those rows; else a cache of one row for `rows`."""
    forked = copy.copy(cache)
    forked.layers = [_fork(layer, rows, index) for layer in cache.layers]
    return forked


def _fork(layer: Any, rows: int, index: Tensor | None) -> Any:
    new = copy.copy(layer)
    for name, value in list(vars(new).items()):
        if isinstance(value, Tensor) and value.dim() >= 2 and value.numel():
            setattr(
                new,
                name,
                value.index_select(0, index) if index is not None else value.expand(rows, *value.shape[1:]),
            )
        elif isinstance(value, dict):
            setattr(new, name, {key: _own(item, rows, index) for key, item in value.items()})
    return new


def _own(state: Any, rows: int, index: Tensor | None) -> Any:
    if not isinstance(state, Tensor) or state.dim() < 2:
        return state
    return state.index_select(0, index) if index is not None else state.expand(rows, *state.shape[1:]).clone()
