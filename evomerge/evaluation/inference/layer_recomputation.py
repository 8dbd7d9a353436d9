"""Decoder layers that keep what enters them alone, and run again in the backward pass.

References:
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.weight_gradients import WeightGradients


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """While it is entered, a model's decoder layers keep no graph of their inside.

    Their key-value cache is the same as ever: a layer that runs again continues a copy of the cache as it was
    when the layer ran first.

    Args:
        model: A transformers model, in evaluation mode.

    Yields:
        Nothing.
    """
    _, layers = stack(model)
    wrapped = list(dict.fromkeys(layers))
    for layer in wrapped:
        layer.forward = _recomputed(layer.forward)
    try:
        yield
    finally:
        for layer in wrapped:
            del layer.forward  # uncovers that of its class


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that keeps its arguments."""

    def run(*arguments: Any, **named: Any) -> Any:
        given = dict(enumerate(arguments)) | named
        cache = next((value for value in given.values() if _is_cache(value)), None)
        if cache is None:
            return _checkpoint(lambda: forward(*arguments, **named))
        before = [copy.copy(layer) for layer in cache.layers]
        after: list[Any] = []

        def on_copy() -> Any:
            forked = copy.copy(cache)
            forked.layers = [copy.copy(layer) for layer in before]
            result = forward(
                *(forked if value is cache else value for value in arguments),
                **{name: forked if value is cache else value for name, value in named.items()},
            )
            after[:] = after or forked.layers
            return result

        result = _checkpoint(on_copy)
        cache.layers = list(after)
        return result

    return run


def _checkpoint(run: Callable[[], Any]) -> Any:
    return checkpoint(run, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first run and of the second, which comes where torch has left the modes of the first."""
    return nullcontext(), WeightGradients.again()


def _is_cache(value: Any) -> bool:
    return isinstance(getattr(value, "layers", None), list)
