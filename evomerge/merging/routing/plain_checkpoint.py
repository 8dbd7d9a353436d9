"""Whether a route is a plain checkpoint: is it what transformers would build from its config?

Some constants depend on a layer's place: a residual scale of one over the root of the depth, attention scaled
by the layer's number, a mixture of experts in every second layer. A layer keeps its own when it is routed; a
checkpoint cannot say so.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from evomerge.checkpoints.refusals import REFUSALS
from evomerge.errors import RouteError
from evomerge.merging.routing import computed_lists
from evomerge.merging.routing.decoder_layers import stack, text_config
from evomerge.merging.routing.fingerprint import fingerprint
from evomerge.merging.routing.layer_source import layer_source
from evomerge.merging.routing.routed_model import RoutedModel

_MANY = 4  # differences of a layer that are named


def reasons(routed: RoutedModel | nn.Module) -> tuple[str, ...]:
    """Why a routed model is not what transformers would load from its saved config and weights.

    Args:
        routed: The model with its route installed. Gains do not count, since weights take them up.

    Returns:
        Sentences of the form 'layer 3 computes with ... = ..., a checkpoint's with ...', in order of the
        layers; none if it is a plain checkpoint.
    """
    model = routed.model if isinstance(routed, RoutedModel) else routed
    try:
        built = _build(model)
        _, built_layers = stack(built)
    except (RouteError, *REFUSALS) as error:
        first_line = str(error).partition("\n")[0]
        return (
            f"transformers cannot build a model from the route's config: {type(error).__name__}: "
            f"{first_line}",
        )
    sentences = _differing_lists(model, built)
    _, layers = stack(model)
    ignored = layer_source(model).index_names | layer_source(built).index_names
    if len(layers) != len(built_layers):
        return (f"the route has {len(layers)} layers, a checkpoint {len(built_layers)}",)
    for i, (layer, other) in enumerate(zip(layers, built_layers, strict=True)):
        sentences += _differences(f"layer {i}", fingerprint(layer, ignored), fingerprint(other, ignored))
    return (*sentences, *_unsaved(model, layers), *_outside(model, built))


def _build(model: nn.Module, device: str = "meta") -> nn.Module:
    """The model that a saved config builds; without values on the device 'meta'."""
    config: Any = model.config
    plain = copy.deepcopy(config)
    computed_lists.restore_class(plain.get_text_config(decoder=True))
    reloaded = type(plain).from_dict(plain.to_dict())
    kind: Any = type(model)
    with torch.device(device):
        built: nn.Module = kind._from_config(
            reloaded, attn_implementation=config._attn_implementation, dtype=next(model.parameters()).dtype
        ).eval()
    return built


def _differing_lists(model: nn.Module, built: nn.Module) -> list[str]:
    """Per-layer values of the config that do not survive the file."""
    lists, other = layer_source(model).layer_config().lists(), text_config(built)
    return [
        f"its config cannot say {key} = {values}; a checkpoint's would be {getattr(other, key, None)}"
        for key, values in lists.items()
        if list(getattr(other, key, None) or ()) != values
    ]


def _unsaved(model: nn.Module, layers: nn.ModuleList) -> list[str]:
    """Buffers that no checkpoint holds and that would be others in a model built anew.

    Only of layers in which they differ at all.
    """
    buffers = [_unsaved_buffers(layer) for layer in layers]
    differing = sorted(
        {
            key
            for own in buffers
            for key in own
            if not all(key not in other or torch.equal(other[key], own[key]) for other in buffers)
        }
    )
    if not differing:
        return []
    built = _build(model, "cpu")  # with values, which takes the memory of the model
    rebuilt = [_unsaved_buffers(layer) for layer in stack(built)[1]]
    return [
        f"layer {i} computes with values of {key} that no checkpoint saves and that are others at its number"
        for i, (own, other) in enumerate(zip(buffers, rebuilt, strict=True))
        for key in differing
        if key in own and key in other and not torch.equal(own[key].cpu(), other[key])
    ]


def _unsaved_buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a layer that its state does not hold."""
    return {
        f"{path}.{name}": buffer
        for path, part in layer.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name in part._non_persistent_buffers_set
    }


def _outside(model: nn.Module, built: nn.Module) -> list[str]:
    """Differences outside the stack, such as a table of layers of the one that holds them."""
    inside = f"{stack(model)[0]}."
    own, other = (
        {key: value for key, value in fingerprint(module).items() if not f"{key[0]}.".startswith(inside)}
        for module in (model, built)
    )
    return _differences("the model", own, other)


def _differences(what: str, own: dict[tuple[str, str], Any], other: dict[tuple[str, str], Any]) -> list[str]:
    missing = object()
    keys = [
        key
        for key in sorted(own.keys() | other.keys())
        if not _is_equal(own.get(key, missing), other.get(key, missing))
    ]
    sentences = []
    for key in keys[:_MANY]:
        name = ".".join(part for part in key if part)
        sentences.append(
            f"{what} computes with {name} = {own.get(key, 'none')}, a checkpoint's with "
            f"{other.get(key, 'none')}"
        )
    if len(keys) > _MANY:
        sentences.append(f"{what} differs in {len(keys) - _MANY} more")
    return sentences


def _is_equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    return a == b or (isinstance(a, float) and abs(a - b) <= 1e-12 * abs(b))
