"""Module trees of their own over the same parameters and buffers, so that a route copies no weight."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from evomerge.merging.routing.layer_source import LayerSource

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
FETCH_HOOK = "fetch_inputs_of_card"
"""Name of the hook by which a module fetches its inputs to its card; copies keep it, see `layer_devices`."""


def view(module: nn.Module, replaced: Mapping[int, Any]) -> Any:
    """Copies a module tree, but not its parameters, buffers and configs, and of its hooks only `FETCH_HOOK`.

    Args:
        module: The module.
        replaced: id of an object in the tree -> what stands for it in the copy.

    Returns:
        The copy.
    """
    memo: dict[int, Any] = dict(replaced)
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor
    for part in module.modules():
        config = vars(part).get("config")
        if config is not None:
            memo.setdefault(id(config), config)
        pre_hooks = vars(part)["_forward_pre_hooks"]
        kept = {key for key, hook in pre_hooks.items() if getattr(hook, "__name__", "") == FETCH_HOOK}
        for name in _HOOKS:
            hooks = OrderedDict((key, hook) for key, hook in vars(part)[name].items() if key in kept)
            memo.setdefault(id(vars(part)[name]), hooks)
    return copy.deepcopy(module, memo)


def empty_shell(shell: LayerSource) -> nn.Module:
    """A view of a whole model with a config of its own and no layers.

    Args:
        shell: The model.

    Returns:
        The view, whose stack is an empty list.
    """
    config = copy.deepcopy(shell.model.config)
    keep_attention(shell.model.config, config)
    replaced: dict[int, Any] = {id(own): new for own, new in _pairs(shell.model.config, config)}
    replaced[id(shell.layers)] = nn.ModuleList()
    model: nn.Module = view(shell.model, replaced)
    return model


def keep_attention(config: Any, copied: Any) -> None:
    """Gives a copied config, and those in it, the attention implementation that copying forgets.

    Args:
        config: The original.
        copied: Its copy; changed in place.
    """
    for own, new in _pairs(config, copied):
        vars(new)["_attn_implementation_internal"] = vars(own).get("_attn_implementation_internal")


def remove_capture_hooks(model: nn.Module) -> None:
    """Removes the hooks with which transformers captures outputs: they know the layers of an earlier route.

    Args:
        model: The model; transformers installs new hooks at the next forward that needs them.
    """
    for module in model.modules():
        attributes = vars(module)
        hooks = attributes["_forward_hooks"]
        captures = [
            key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "output_capturing_hook"
        ]
        for key in captures:
            del hooks[key]
        if attributes.get("_output_capturing_hooks_installed"):
            attributes["_output_capturing_hooks_installed"] = False


def _pairs(own: Any, new: Any) -> list[tuple[Any, Any]]:
    """A config and its copy, and so for each config in it."""
    pairs = [(own, new)]
    for name, value in vars(own).items():
        if hasattr(value, "attribute_map"):
            pairs += _pairs(value, vars(new)[name])
    return pairs
