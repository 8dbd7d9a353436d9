"""A model over several cards: each has a run of decoder layers, the first also what is outside the stack.

Embeddings, head and other towers lie on the first card, so that inputs and logits are where scoring expects
them and tied weights stay tied. A layer moves what it is called with to its own card; what comes after the
stack moves it back. Copies between cards were never run on real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.merging.memory_plan import MemoryPlan
from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.routing.module_views import FETCH_HOOK


@dataclass(frozen=True, slots=True)
class LayerDevices:
    """The devices of a worker's cards, and the layers that each has.

    Attributes:
        names: torch's names of the devices, the one that scores first.
        layers: The decoder layers of each.
    """

    names: tuple[str, ...]
    layers: tuple[range, ...]

    @property
    def first(self) -> str:
        """The device of inputs, logits and what is outside the stack."""
        return self.names[0]

    def of(self, layer: int | None) -> str:
        """The device of a layer.

        Args:
            layer: Index in the stack; None for what is outside it.

        Returns:
            torch's name; the last card's for a layer that no card has.
        """
        if layer is None:
            return self.first
        found = (name for name, layers in zip(self.names, self.layers, strict=True) if layer in layers)
        return next(found, self.names[-1])


def devices_of(plan: MemoryPlan | None, names: Sequence[str]) -> LayerDevices:
    """The devices by a plan of memory.

    Args:
        plan: The plan; None where everything lies on the first device.
        names: torch's names of its cards.

    Returns:
        The devices.
    """
    if plan is None:
        return LayerDevices((names[0],), (range(0),))
    return LayerDevices(tuple(names), tuple(card.layers for card in plan.cards))


def place_model(model: nn.Module, devices: str | LayerDevices) -> nn.Module:
    """Moves a loaded model to its devices, and has its layers fetch their inputs.

    Args:
        model: A transformers model; its parameters stay the same objects.
        devices: torch's name of its device, or where its layers belong.

    Returns:
        The model.

    Raises:
        RouteError: Several devices, and the model has no list of layers.
    """
    if isinstance(devices, str):
        return model.to(devices)
    if len(devices.names) == 1:
        return model.to(devices.first)
    _, layers = stack(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            _move(module, devices.of(index))
        fetch_inputs(layer, devices.of(index))
    for module in model.modules():
        if id(module) not in inside:
            _move(module, devices.first)
            if next(module.parameters(recurse=False), None) is not None:
                fetch_inputs(module, devices.first)
    return model


def _move(module: nn.Module, device: str) -> None:
    """Moves a module's own parameters and buffers; parameters stay the same objects."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


def fetch_inputs(module: nn.Module, device: str) -> None:
    """Has a module move the tensors that it is called with to its device.

    Args:
        module: The module.
        device: torch's name of the device.
    """
    target = torch.device(device)

    def fetch_inputs_of_card(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        return moved(args, target), moved(kwargs, target)

    assert fetch_inputs_of_card.__name__ == FETCH_HOOK
    module.register_forward_pre_hook(fetch_inputs_of_card, with_kwargs=True)


def moved(value: Any, device: torch.device) -> Any:
    """A value with the tensors in it on a device.

    Args:
        value: A tensor, a tuple, list or dict of values, or anything else, which is left alone: a cache has
            each layer's keys on that layer's device already.
        device: The device.

    Returns:
        The value itself where nothing in it moves.
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if type(value) in (tuple, list):
        parts = [moved(part, device) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if type(value) is dict:
        items = {key: moved(part, device) for key, part in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    return value
