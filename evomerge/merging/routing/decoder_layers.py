"""The decoder layers of a live transformers model, and what each of them is called with. No table of architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import RouteError

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments that a model gives one of its layers. stream: where the hidden state is among them, an index or a name."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    stream: int | str

    @property
    def hidden(self) -> Tensor:
        """The hidden state that enters the layer [..., tokens, width]."""
        found: Tensor = (
            self.arguments[self.stream] if isinstance(self.stream, int) else self.named[self.stream]
        )
        return found

    def run(self, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden state that leaves a layer, called as before but for the one that enters."""
        arguments, named = list(self.arguments), dict(self.named)
        if isinstance(self.stream, int):
            arguments[self.stream] = hidden
        else:
            named[self.stream] = hidden
        found = forward(*arguments, **named)
        output: Tensor = found[0] if isinstance(found, (tuple, list)) else found
        return output

    def cast(self, dtype: torch.dtype) -> Call:
        """The same arguments with every floating tensor in another type."""
        return Call(_cast(self.arguments, dtype), _cast(dict(self.named), dtype), self.stream)


class _Found(Exception):
    """Ends a forward early."""


def text_config(model: nn.Module) -> Any:
    """The config of a model's language tower: its own config where it has no other tower."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The text decoder's layers: (dotted path inside the model, the list itself).

    It is the list as long as the text config says whose owner carries that config; a vision tower of equal depth carries
    another. Raises RouteError if there is none.
    """
    config = text_config(model)
    depth = config.num_hidden_layers
    found = [
        (path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    owned = [
        (path, m)
        for path, m in found
        if getattr(model.get_submodule(path.rpartition(".")[0]), "config", None) is config
    ]
    if not found:
        raise RouteError(
            f"{type(model).__name__} has no list of {depth} layers, the depth that its config says; it cannot be routed"
        )
    return min(owned or found, key=lambda pair: pair[0].count("."))


def calls(model: nn.Module, tokens: Tensor, last: int | None = None) -> list[Call]:
    """What each layer is called with in one uncached forward. tokens: ids [B, T]; last: layers after it are not run.

    Raises RouteError for a model whose layers are not called once each with a hidden state.
    """
    _, layers = stack(model)
    last = len(layers) - 1 if last is None else last
    found: dict[int, Call] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.setdefault(
                index,
                _call(
                    arguments,
                    {k: None if k in _CACHES else v for k, v in named.items()},
                    type(module).__name__,
                ),
            )
            if index == last:
                raise _Found

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(i), with_kwargs=True)
        for i, layer in enumerate(layers[: last + 1])
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != last + 1:
        raise RouteError(
            f"{type(model).__name__} calls {len(found)} of its first {last + 1} layers in a forward; it cannot be routed"
        )
    return [found[i] for i in range(last + 1)]


def sample(model: nn.Module, rows: int = 2, length: int = 12) -> Tensor:
    """Token ids [rows, length], the same for models of one vocabulary, on the model's device."""
    top = int(text_config(model).vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, top - 1), min(top, 1000), (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


def index_names(layers: Sequence[nn.Module]) -> frozenset[str]:
    """Names of the attributes in which layers keep their own number: in every layer, every one of that name equals it."""
    kept: dict[str, bool] = {}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name, value in vars(module).items():
                if type(value) is int and (len(layers) > 1 or "layer" in name):
                    kept[name] = kept.get(name, True) and value == number
    return frozenset(name for name, is_index in kept.items() if is_index)


def _call(arguments: tuple[Any, ...], named: dict[str, Any], kind: str) -> Call:
    if arguments and isinstance(arguments[0], Tensor):
        return Call(arguments, named, 0)
    if isinstance(named.get("hidden_states"), Tensor):
        return Call(arguments, named, "hidden_states")
    floating = [
        name
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3
    ]
    if not floating:
        raise RouteError(f"no hidden state among the arguments of {kind}; it cannot be routed")
    return Call(arguments, named, floating[0])


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
