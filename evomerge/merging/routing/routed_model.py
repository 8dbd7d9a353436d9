"""Models whose layers are other models' layers, taken by reference: no weight is copied, whatever the route.

A hop has a module tree of its own, since it has its own slot in the key-value cache and its own place in the
config; the tensors in it are the source's. A gain is applied to the weights as they are read, to the very
bits that `scale_folding.folded` gives. Knows nothing of recipes.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from evomerge.errors import RouteError
from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.decoder_layers import text_config
from evomerge.merging.routing.layer_source import LayerSource, layer_source, route_changes, write_changes
from evomerge.merging.routing.module_views import empty_shell, keep_attention, remove_capture_hooks, view
from evomerge.merging.routing.scale_folding import Fold

_CACHE_FACTOR = 4
"""Clones of layers that are cached: this many times the length of the installed route."""

_ROUTED = "_evomerge_routed"


def is_routed(model: nn.Module) -> bool:
    """Whether a module takes routes.

    Args:
        model: A live model.

    Returns:
        True for the `model` of a `RoutedModel`, whose layers may change from candidate to candidate.
    """
    return _ROUTED in vars(model)


@dataclass(frozen=True, slots=True)
class Hop:
    """One layer of a route.

    Attributes:
        model: The live transformers model that the layer is taken from.
        layer: Its index in that model's stack.
        gain: Factor of what it adds to the hidden state, in (0, inf).
    """

    model: nn.Module
    layer: int
    gain: float = 1.0


def gains(scales: Sequence[float], depth: int) -> tuple[float, ...]:
    """Gains of a route that stand for scales of its hidden states: 1 / (scales[0] ... scales[t]).

    Args:
        scales: scales[t] multiplies the hidden state as it enters hop t, in (0, inf); none for all 1. The
            first is 1: the embeddings are small beside the norm's epsilon, so scaling them is not exact.
        depth: Number of hops.

    Returns:
        One gain a hop.

    Raises:
        RouteError: There are not `depth` scales, one is out of range, or the first is not 1.
    """
    if not scales:
        return (1.0,) * depth
    if len(scales) != depth:
        raise RouteError(f"{len(scales)} scales for {depth} layers; give one a layer, or none")
    if scales[0] != 1:
        raise RouteError(f"scales[0] is {scales[0]}, must be 1")
    for i, scale in enumerate(scales):
        if not 0 < scale < math.inf:
            raise RouteError(f"scales[{i}] is {scale}, must be in (0, inf)")
    return tuple(1 / math.prod(scales[: i + 1]) for i in range(depth))


def routed_config(shell: nn.Module, hops: Sequence[Hop]) -> Any:
    """The shell's config with what it says of each layer gathered along a route.

    Args:
        shell: The model whose embeddings, head and config the route gets.
        hops: The route.

    Returns:
        A new config.

    Raises:
        RouteError: A layer is not there.
    """
    config = copy.deepcopy(shell.config)
    text = config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    sources = {id(model): layer_source(model) for model in (shell, *(hop.model for hop in hops))}
    changes = route_changes(sources[id(shell)], [(sources[id(hop.model)], hop.layer) for hop in hops])
    write_changes(text, changes, overrule=False)
    keep_attention(shell.config, config)
    return config


class RoutedModel:
    """A module that takes one route after another and stays the same object.

        routed = RoutedModel(base, [base, math])
        routed.install([Hop(base, 0), Hop(math, 1), Hop(base, 3)])
        logits = routed.model(input_ids=tokens).logits

    Embeddings, final norm, head and other towers are the shell's.

    Attributes:
        model: The module.
        hops: The installed route.
    """

    def __init__(self, shell: nn.Module, sources: Sequence[nn.Module] = ()) -> None:
        """Starts as the shell's own route.

        Args:
            shell: A live transformers model.
            sources: Models that hops will come from; they are inspected now instead of at their first hop.

        Raises:
            RouteError: A model has no stack of layers.
        """
        self._sources = {id(model): layer_source(model) for model in (shell, *sources)}
        self._shell = self._sources[id(shell)]
        self.model: nn.Module = empty_shell(self._shell)
        vars(self.model)[_ROUTED] = True
        self._text = text_config(self.model)
        self._stack = self.model.get_submodule(self._shell.path)
        self._clones: OrderedDict[tuple[int, int, int], _Clone] = OrderedDict()
        self._followers = _followers(self.model, self._shell)
        self.hops: tuple[Hop, ...] = ()
        self.install([Hop(shell, i) for i in range(len(self._shell.layers))])

    def install(self, hops: Sequence[Hop]) -> None:
        """Makes the module a route; leaves it as it is if that fails.

        Args:
            hops: The route, at least one hop.

        Raises:
            RouteError: A layer is not there.
            FoldError: A layer cannot take up its gain.
        """
        if not hops:
            raise RouteError("a route has no layers, it must have at least one")
        changes = route_changes(self._shell, [(self._source(hop), hop.layer) for hop in hops])
        clones = [self._clone(hop, position) for position, hop in enumerate(hops)]
        for clone, hop in zip(clones, hops, strict=True):  # what may fail, before anything changes
            clone.prepare(hop)
        for clone, hop in zip(clones, hops, strict=True):
            clone.set(hop.gain, changes.lists, len(hops))
        write_changes(self._text, changes, overrule=True)
        self._stack._modules.clear()
        self._stack._modules.update((str(i), clone.layer) for i, clone in enumerate(clones))
        for follower in self._followers:
            follower.follow(changes.lists, len(hops))
        remove_capture_hooks(self.model)
        self.hops = tuple(hops)
        while len(self._clones) > _CACHE_FACTOR * len(hops):
            self._clones.popitem(last=False)

    def _source(self, hop: Hop) -> LayerSource:
        if id(hop.model) not in self._sources:
            self._sources[id(hop.model)] = layer_source(hop.model)
        return self._sources[id(hop.model)]

    def _clone(self, hop: Hop, position: int) -> _Clone:
        """The layer of a hop at a position of the route, from the cache if it was there before."""
        source = self._source(hop)
        key = (id(hop.model), hop.layer, position)
        if key not in self._clones:
            configs = {id(source.model.config): self.model.config, id(source.text): self._text}
            layer: nn.Module = view(source.layers[hop.layer], configs)
            for module in layer.modules():
                for name in source.index_names & vars(module).keys():
                    setattr(module, name, position)
            self._clones[key] = _Clone(layer, _followers(layer, source))
        self._clones.move_to_end(key)
        return self._clones[key]


@dataclass(frozen=True, slots=True)
class _Follower:
    """An attribute that holds what the config lists of each layer under a key; key None: the depth."""

    module: nn.Module
    name: str
    key: str | None

    def follow(self, lists: Mapping[str, list[Any]], depth: int) -> None:
        """Sets the attribute to the values of a route."""
        if self.key is None:
            value: Any = depth
        else:
            value = list(lists[self.key]) if self.key in lists else None
        setattr(self.module, self.name, value)


@dataclass(slots=True)
class _Gain:
    """What the factors of one clone share.

    cache: scaled weights, only while the layer runs; running: whether it does.
    """

    gain: float
    cache: dict[str, Tensor]
    running: bool = False

    def start(self, module: nn.Module, arguments: Any) -> None:
        self.running = True

    def stop(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.running = False
        self.cache.clear()


class _Scaled(nn.Module):
    """A parameter that takes up a gain as it is read."""

    def __init__(self, shared: _Gain, fold: Fold, name: str) -> None:
        super().__init__()
        self.shared, self.fold, self.name = shared, fold, name

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter itself at gain 1, else a new tensor, made once in a forward of the layer."""
        if self.shared.gain == 1.0:
            return weight
        scaled = self.shared.cache.get(self.name)
        if scaled is None:
            factor, form = scale_folding.factor(self.fold, self.name, self.shared.gain)
            scaled = scale_folding.scaled(weight.detach(), factor, form)
            if self.shared.running:
                self.shared.cache[self.name] = scaled
        return scaled


@dataclass(slots=True)
class _Clone:
    """A layer of a route. followers: see `_followers`; gain: None until the layer first has a gain."""

    layer: nn.Module
    followers: tuple[_Follower, ...]
    gain: _Gain | None = None

    def prepare(self, hop: Hop) -> None:
        """Makes the layer able to take a gain, if the hop has one. Raises FoldError, RouteError."""
        if not 0 < hop.gain < math.inf:
            raise RouteError(f"the gain of layer {hop.layer} is {hop.gain}, must be in (0, inf)")
        if hop.gain == 1 or self.gain is not None:
            return
        fold = scale_folding.fold_of(hop.model, hop.layer)
        self.gain = _Gain(1.0, {})
        for name in fold.names:
            owner, _, leaf = name.rpartition(".")
            scaled = _Scaled(self.gain, fold, name)
            parametrize.register_parametrization(self.layer.get_submodule(owner), leaf, scaled, unsafe=True)
        self.layer.register_forward_pre_hook(self.gain.start)
        self.layer.register_forward_hook(self.gain.stop, always_call=True)

    def set(self, gain: float, lists: Mapping[str, list[Any]], depth: int) -> None:
        """Gives the layer its gain and the values of the route around it."""
        if self.gain is not None:
            self.gain.gain = gain
        for follower in self.followers:
            follower.follow(lists, depth)


def _followers(module: nn.Module, source: LayerSource) -> tuple[_Follower, ...]:
    """What modules remember of the layers beside the config: a list copied from it, the depth."""
    followers = []
    lists = source.layer_config().lists()
    depth = len(source.layers)
    for part in module.modules():
        for name, value in vars(part).items():
            if type(value) is int and value == depth and name in source.depth_names:
                followers.append(_Follower(part, name, None))
            elif isinstance(value, (list, tuple)) and len(value) == depth:
                equal_keys = [key for key in (name, *lists) if lists.get(key) == list(value)]
                if equal_keys:
                    followers.append(_Follower(part, name, equal_keys[0]))
    return tuple(followers)
