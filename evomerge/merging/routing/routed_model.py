"""Models whose layers are other models' layers, taken by reference: no weight is copied, whatever the route.

A hop has a module tree of its own, since it has its own slot in the key-value cache and its own place in the config; the
tensors in it are the source's. A gain is applied to the weights as they are read, to the very bits that `folding.folded` gives.
Knows nothing of recipes.
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
from evomerge.merging.routing.decoder_layers import stack as stack
from evomerge.merging.routing.decoder_layers import text_config
from evomerge.merging.routing.layer_config import Source, changes, source, write
from evomerge.merging.routing.layer_config import signature as signature
from evomerge.merging.routing.scale_folding import Fold

REFUSALS = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
SCALED = 5e-4
"""Largest difference that is accepted between gains in a model's weights and hidden states that are scaled, of the logits' deviation."""
_KEPT = 4  # clones that are kept: this many times the longest route so far
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True, slots=True)
class Hop:
    """One layer of a route. model: a live transformers model; layer: index in its stack; gain: factor of what it adds, in (0, inf)."""

    model: nn.Module
    layer: int
    gain: float = 1.0


def gains(scales: Sequence[float], depth: int) -> tuple[float, ...]:
    """Gains of a route whose hop t multiplies the hidden state by scales[t] as it enters: 1 / (scales[0] ... scales[t]).

    No scales are all 1. Raises RouteError unless there are `depth` of them in (0, inf) and the first is 1: the embeddings
    are small beside the norm's epsilon, so scaling them is not exact.
    """
    if not scales:
        return (1.0,) * depth
    if len(scales) != depth:
        raise RouteError(f"{len(scales)} scales for {depth} layers; give one a layer, or none")
    if scales[0] != 1:
        raise RouteError(f"scales[0] is {scales[0]}, must be 1")
    bad = [(i, s) for i, s in enumerate(scales) if not 0 < s < math.inf]
    if bad:
        raise RouteError(f"scales[{bad[0][0]}] is {bad[0][1]}, must be in (0, inf)")
    return tuple(1 / math.prod(scales[: i + 1]) for i in range(depth))


def routed_config(shell: nn.Module, hops: Sequence[Hop]) -> Any:
    """The shell's config with what it says of each layer gathered along a route. Raises RouteError for a layer that is not there."""
    config = copy.deepcopy(shell.config)
    text = config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    sources = {id(model): source(model) for model in (shell, *(hop.model for hop in hops))}
    write(
        text,
        changes(sources[id(shell)], [(sources[id(hop.model)], hop.layer) for hop in hops]),
        computed=False,
    )
    _keep_attention(shell.config, config)
    return config


class Routed:
    """A module that takes one route after another and stays the same object. Embeddings, final norm, head and other towers are the shell's."""

    def __init__(self, shell: nn.Module, sources: Sequence[nn.Module] = ()) -> None:
        """Starts as the shell's own route. sources: models that hops will come from, looked at now instead of at the first hop."""
        self._sources = {id(model): source(model) for model in (shell, *sources)}
        self._shell = self._sources[id(shell)]
        self.model: nn.Module = _empty(self._shell)
        self._text = text_config(self.model)
        self._stack = self.model.get_submodule(self._shell.path)
        self._clones: OrderedDict[tuple[int, int, int], _Clone] = OrderedDict()
        self._followers = _followers(self.model, self._shell)
        self.hops: tuple[Hop, ...] = ()
        self.install([Hop(shell, i) for i in range(len(self._shell.layers))])

    def install(self, hops: Sequence[Hop]) -> None:
        """Makes the module a route. Raises RouteError for a layer that is not there, FoldError for a gain that a layer cannot take."""
        if not hops:
            raise RouteError("a route has no layers, it must have at least one")
        changed = changes(self._shell, [(self._source(hop), hop.layer) for hop in hops])
        clones = [self._clone(hop, position) for position, hop in enumerate(hops)]
        for clone, hop in zip(clones, hops, strict=True):  # what may fail, before anything changes
            clone.prepare(hop)
        for clone, hop in zip(clones, hops, strict=True):
            clone.set(hop.gain, changed.lists, len(hops))
        write(self._text, changed, computed=True)
        self._stack._modules.clear()
        self._stack._modules.update((str(i), clone.layer) for i, clone in enumerate(clones))
        for follower in self._followers:
            follower.follow(changed.lists, len(hops))
        _strip(self.model)
        self.hops = tuple(hops)
        while len(self._clones) > _KEPT * len(hops):
            self._clones.popitem(last=False)

    def _source(self, hop: Hop) -> Source:
        if id(hop.model) not in self._sources:
            self._sources[id(hop.model)] = source(hop.model)
        return self._sources[id(hop.model)]

    def _clone(self, hop: Hop, position: int) -> _Clone:
        home = self._source(hop)
        key = (id(hop.model), hop.layer, position)
        if key not in self._clones:
            configs = {id(home.model.config): self.model.config, id(home.text): self._text}
            layer: nn.Module = _view(home.layers[hop.layer], configs)
            for module in layer.modules():
                for name in home.index_names & vars(module).keys():
                    setattr(module, name, position)
            self._clones[key] = _Clone(layer, _followers(layer, home))
        self._clones.move_to_end(key)
        return self._clones[key]


@dataclass(frozen=True, slots=True)
class _Follower:
    """An attribute that holds the depth, or what the config lists of each layer under a key."""

    module: nn.Module
    name: str
    key: str | None

    def follow(self, lists: Mapping[str, list[Any]], depth: int) -> None:
        setattr(
            self.module,
            self.name,
            depth if self.key is None else list(lists[self.key]) if self.key in lists else None,
        )


@dataclass(slots=True)
class _Gain:
    """What the factors of one clone share. kept: scaled weights, only while the layer runs; running: whether it does."""

    gain: float
    kept: dict[str, Tensor]
    running: bool = False

    def start(self, module: nn.Module, arguments: Any) -> None:
        self.running = True

    def stop(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.running = False
        self.kept.clear()


class _Scaled(nn.Module):
    """A parameter that takes up a gain as it is read."""

    def __init__(self, shared: _Gain, fold: Fold, name: str) -> None:
        super().__init__()
        self.shared, self.fold, self.name = shared, fold, name

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter itself at gain 1, else a new tensor, made once in a forward of the layer."""
        if self.shared.gain == 1.0:
            return weight
        found = self.shared.kept.get(self.name)
        if found is None:
            found = scale_folding.scaled(
                weight.detach(), *scale_folding.factor(self.fold, self.name, self.shared.gain)
            )
            if self.shared.running:
                self.shared.kept[self.name] = found
        return found


@dataclass(slots=True)
class _Clone:
    """A layer of a route. followers: see `_followers`; gain: None until a gain is first asked for."""

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
        if self.gain is not None:
            self.gain.gain = gain
        for follower in self.followers:
            follower.follow(lists, depth)


# ---- module trees over the same tensors ------------------------------------------------------------------------------------


def _view(module: nn.Module, replaced: Mapping[int, Any]) -> Any:
    """A module tree of its own over the same parameters and buffers, without hooks. replaced: id of an object -> what stands for it."""
    memo: dict[int, Any] = dict(replaced)
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor
    for part in module.modules():
        config = vars(part).get("config")
        if config is not None:
            memo.setdefault(id(config), config)
        for name in _HOOKS:
            memo.setdefault(id(vars(part)[name]), OrderedDict())
    return copy.deepcopy(module, memo)


def _empty(shell: Source) -> nn.Module:
    """The shell's module tree with a config of its own and no layers."""
    config = copy.deepcopy(shell.model.config)
    _keep_attention(shell.model.config, config)
    replaced: dict[int, Any] = {id(own): new for own, new in _pairs(shell.model.config, config)} | {
        id(shell.layers): nn.ModuleList()
    }
    model: nn.Module = _view(shell.model, replaced)
    return model


def _pairs(own: Any, new: Any) -> list[tuple[Any, Any]]:
    """A config and its copy, and so for each config in it."""
    found = [(own, new)]
    for name, value in vars(own).items():
        if hasattr(value, "attribute_map"):
            found += _pairs(value, vars(new)[name])
    return found


def _keep_attention(own: Any, new: Any) -> None:
    """A copy of a config forgets which attention was asked for; so do the configs in it."""
    for config, copied in _pairs(own, new):
        vars(copied)["_attn_implementation_internal"] = vars(config).get("_attn_implementation_internal")


def _followers(module: nn.Module, home: Source) -> tuple[_Follower, ...]:
    """What modules remember of the layers beside the config: a list copied from it, the depth."""
    found = []
    lists = home.lists()
    depth = len(home.layers)
    for part in module.modules():
        for name, value in vars(part).items():
            if type(value) is int and value == depth and name in home.depth_names:
                found.append(_Follower(part, name, None))
            elif isinstance(value, (list, tuple)) and len(value) == depth:
                keys = [k for k in (name, *lists) if lists.get(k) == list(value)]
                found += [_Follower(part, name, keys[0])] if keys else []
    return tuple(found)


def _strip(model: nn.Module) -> None:
    """Takes off the hooks with which transformers captures outputs: they know the layers of an earlier route."""
    for module in model.modules():
        own = vars(module)
        for key in [
            k
            for k, hook in own["_forward_hooks"].items()
            if getattr(hook, "__name__", "") == "output_capturing_hook"
        ]:
            del own["_forward_hooks"][key]
        if own.get("_output_capturing_hooks_installed"):
            own["_output_capturing_hooks_installed"] = False
