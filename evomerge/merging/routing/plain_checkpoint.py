"""Whether a route is a plain checkpoint: what transformers would build from its config, compared with what it is.

Some constants depend on a layer's place: a residual scale of one over the root of the depth, attention scaled by the layer's
number, a mixture of experts in every second layer. A layer keeps its own when it is routed; a checkpoint cannot say so.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from evomerge.errors import RouteError
from evomerge.merging.routing.decoder_layers import stack, text_config
from evomerge.merging.routing.layer_config import fingerprint, source
from evomerge.merging.routing.routed_model import Routed

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
_MANY = 4


def reasons(routed: Routed | nn.Module) -> tuple[str, ...]:
    """Why a routed model is not what transformers would load from its saved config and weights; none if it is.

    Sentences of the form 'layer 3 computes with ... = ..., a checkpoint's with ...', in order of the layers. Gains are not
    looked at, since weights take them up.
    """
    model = routed.model if isinstance(routed, Routed) else routed
    try:
        built = _skeleton(model)
        _, theirs = stack(built)
    except (RouteError, *_REFUSALS) as error:
        return (
            f"transformers cannot build a model from the route's config: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
        )
    found = _lists(model, built)
    _, own = stack(model)
    ignored = source(model).index_names | source(built).index_names
    if len(own) != len(theirs):
        return (f"the route has {len(own)} layers, a checkpoint {len(theirs)}",)
    for i, (mine, other) in enumerate(zip(own, theirs, strict=True)):
        found += _differences(f"layer {i}", fingerprint(mine, ignored), fingerprint(other, ignored))
    return (*found, *_unsaved(model, own), *_outside(model, built))


def _skeleton(model: nn.Module, device: str = "meta") -> nn.Module:
    """The model that a saved config builds; without values on the device 'meta'."""
    config: Any = model.config
    attention = config._attn_implementation
    plain = copy.deepcopy(config)
    text = plain.get_text_config(decoder=True)
    text.__class__ = getattr(type(text), "_evomerge_written", type(text))
    reloaded = type(plain).from_dict(plain.to_dict())
    kind: Any = type(model)
    with torch.device(device):
        built: nn.Module = kind._from_config(
            reloaded, attn_implementation=attention, dtype=next(model.parameters()).dtype
        ).eval()
    return built


def _lists(model: nn.Module, built: nn.Module) -> list[str]:
    """Per-layer values of the config that do not survive the file."""
    own, other = source(model).lists(), text_config(built)
    wrong = [key for key, values in own.items() if list(getattr(other, key, None) or ()) != values]
    return [
        f"its config cannot say {key} = {own[key]}; a checkpoint's would be {getattr(other, key, None)}"
        for key in wrong
    ]


def _unsaved(model: nn.Module, layers: nn.ModuleList) -> list[str]:
    """Buffers that no checkpoint holds and that would be others in a model built anew; only of layers in which they differ at all."""
    own = [_buffers(layer) for layer in layers]
    differing = sorted(
        {
            key
            for found in own
            for key in found
            if not all(key not in o or torch.equal(o[key], found[key]) for o in own)
        }
    )
    if not differing:
        return []
    theirs = [
        _buffers(layer) for layer in stack(_skeleton(model, "cpu"))[1]
    ]  # with values, which takes the memory of the model
    wrong = [
        (i, key)
        for i, (mine, other) in enumerate(zip(own, theirs, strict=True))
        for key in differing
        if key in mine and key in other and not torch.equal(mine[key].cpu(), other[key])
    ]
    return [
        f"layer {i} computes with values of {key} that no checkpoint saves and that are others at its number"
        for i, key in wrong
    ]


def _buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a layer that its state does not hold."""
    return {
        f"{path}.{name}": buffer
        for path, part in layer.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name in part._non_persistent_buffers_set
    }


def _outside(model: nn.Module, built: nn.Module) -> list[str]:
    """Differences outside the stack, such as a table of layers of the one that holds them."""
    path, _ = stack(model)
    mine, other = fingerprint(model), fingerprint(built)
    inside = f"{path}."
    return _differences(
        "the model",
        *({k: v for k, v in found.items() if not f"{k[0]}.".startswith(inside)} for found in (mine, other)),
    )


def _differences(what: str, mine: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> list[str]:
    missing = object()
    found = [
        key
        for key in sorted(mine.keys() | other.keys())
        if not _equal(mine.get(key, missing), other.get(key, missing))
    ]
    said = [
        f"{what} computes with {'.'.join(part for part in key if part)} = {mine.get(key, 'none')}, a checkpoint's with {other.get(key, 'none')}"
        for key in found[:_MANY]
    ]
    return said + ([f"{what} differs in {len(found) - _MANY} more"] if len(found) > _MANY else [])


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (isinstance(a, float) and abs(a - b) <= 1e-12 * abs(b)))
