"""The decoder layers of a live transformers model, and what each is called with, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import RouteError

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")
"""Names under which layers are given a key-value cache."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments that a model gives one of its layers.

    Attributes:
        arguments: The positional ones.
        named: The named ones, without a cache.
        hidden_key: Where the hidden state is among them: an index of `arguments` or a name of `named`.
    """

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    hidden_key: int | str

    @property
    def hidden(self) -> Tensor:
        """The hidden state that enters the layer [..., tokens, width]."""
        if isinstance(self.hidden_key, int):
            hidden: Tensor = self.arguments[self.hidden_key]
        else:
            hidden = self.named[self.hidden_key]
        return hidden

    def run(self, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Calls a layer as it was called, with another hidden state.

        Args:
            forward: The layer, or a function in its place.
            hidden: The hidden state that enters [..., tokens, width].

        Returns:
            The hidden state that leaves [..., tokens, width].
        """
        arguments, named = list(self.arguments), dict(self.named)
        if isinstance(self.hidden_key, int):
            arguments[self.hidden_key] = hidden
        else:
            named[self.hidden_key] = hidden
        result = forward(*arguments, **named)
        output: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return output

    def cast(self, dtype: torch.dtype) -> Call:
        """The same call in another type.

        Args:
            dtype: Type of every floating tensor among the arguments of the result.

        Returns:
            The call.
        """
        return Call(_cast(self.arguments, dtype), _cast(dict(self.named), dtype), self.hidden_key)


class _EnoughSeen(Exception):
    """Ends a forward early."""


def text_config(model: nn.Module) -> Any:
    """The config of a model's language tower.

    Args:
        model: A transformers model.

    Returns:
        Its own config where it has no other tower.
    """
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Finds the text decoder's layers.

    They are the list as long as the text config says whose owner carries that config; a vision tower of equal
    depth carries another.

    Args:
        model: A transformers model.

    Returns:
        (dotted path inside the model, the list itself).

    Raises:
        RouteError: There is no such list.
    """
    config = text_config(model)
    depth = config.num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise RouteError(
            f"{type(model).__name__} has no list of {depth} layers, the depth that its config says; it "
            "cannot be routed"
        )
    owned = [
        (path, module)
        for path, module in lists
        if getattr(model.get_submodule(path.rpartition(".")[0]), "config", None) is config
    ]
    return min(owned or lists, key=lambda pair: pair[0].count("."))


def calls(model: nn.Module, tokens: Tensor, last: int | None = None) -> list[Call]:
    """Records what each layer is called with in one uncached forward.

    Args:
        model: A transformers model.
        tokens: Token ids [rows, length].
        last: Layers after this one are not run; None: all are.

    Returns:
        One call a layer, in order.

    Raises:
        RouteError: The layers are not called once each with a hidden state.
    """
    _, layers = stack(model)
    last = len(layers) - 1 if last is None else last
    recorded: dict[int, Call] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            without_cache = {name: None if name in _CACHES else value for name, value in named.items()}
            recorded.setdefault(index, _call(arguments, without_cache, type(module).__name__))
            if index == last:
                raise _EnoughSeen

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(i), with_kwargs=True)
        for i, layer in enumerate(layers[: last + 1])
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except _EnoughSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(recorded) != last + 1:
        raise RouteError(
            f"{type(model).__name__} calls {len(recorded)} of its first {last + 1} layers in a forward; "
            "it cannot be routed"
        )
    return [recorded[i] for i in range(last + 1)]


def sample(model: nn.Module, rows: int = 2, length: int = 12) -> Tensor:
    """Random tokens, the same for models of one vocabulary.

    Args:
        model: A transformers model.
        rows: Number of rows.
        length: Tokens in a row.

    Returns:
        Token ids [rows, length] below 1000, on the model's device.
    """
    vocabulary = int(text_config(model).vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), min(vocabulary, 1000), (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def index_names(layers: Sequence[nn.Module]) -> frozenset[str]:
    """Names of the attributes in which layers keep their own number.

    Args:
        layers: All layers of a stack.

    Returns:
        The names that, in every layer and wherever they occur in it, hold its number.
    """
    is_index: dict[str, bool] = {}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name, value in vars(module).items():
                if type(value) is int and (len(layers) > 1 or "layer" in name):
                    is_index[name] = is_index.get(name, True) and value == number
    return frozenset(name for name, holds in is_index.items() if holds)


def _call(arguments: tuple[Any, ...], named: dict[str, Any], kind: str) -> Call:
    if arguments and isinstance(arguments[0], Tensor):
        return Call(arguments, named, 0)
    if isinstance(named.get("hidden_states"), Tensor):
        return Call(arguments, named, "hidden_states")
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
            return Call(arguments, named, name)
    raise RouteError(f"no hidden state among the arguments of {kind}; it cannot be routed")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
