"""Models whose layers are other models' layers, taken by reference: no weight is copied, whatever the route.

A hop has a module tree of its own, since it has its own slot in the key-value cache and its own place in the config; the
tensors in it are the source's. A gain is applied to the weights as they are read, to the very bits that `folding.folded` gives.
Knows nothing of recipes.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evomerge import folding
from evomerge.errors import FoldError, RouteError
from evomerge.folding import Fold
from evomerge.gathering import Source, changes, source, write
from evomerge.gathering import signature as signature
from evomerge.stacks import calls, sample, text_config
from evomerge.stacks import stack as stack

_REFUSALS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, NotImplementedError)
_SCALED = 5e-4
"""Largest difference that is accepted between gains in a model's weights and hidden states that are scaled, of the logits' deviation."""
_ROUNDINGS = 64  # of a type with few bits that may add up to such a difference
_DRAWS = 3  # of scales
_LONG = 8  # hops of the route that is tried, at least
_KEPT = 4  # clones that are kept: this many times the longest route so far
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


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
    write(text, changes(sources[id(shell)], [(sources[id(hop.model)], hop.layer) for hop in hops]), computed=False)
    _keep_attention(shell.config, config)
    return config


def check_routable(models: Mapping[str, nn.Module], base: str) -> None:
    """Raises RouteError, naming the model and what differs, unless layers of the models can be stacked into the base's shell.

    Their stacks must be owned by the same class, be as wide, and rotate positions and compute attention alike: rotary
    embeddings belong to the stack, and a layer carries only its own weights.
    """
    shell = source(models[base])
    for name, model in models.items():
        for what, own, expected in zip(_WHAT, _kind(source(model)), _kind(shell), strict=True):
            if own != expected:
                raise RouteError(f"{what} of '{name}' is {own}, of '{base}' {expected}; their layers cannot be stacked, leave '{name}' out")
    for name, model in models.items():
        _check_rotary(name, source(model), base, shell)


def routable_by_numbers(model: nn.Module) -> None:
    """Raises RouteError unless a route of a model's own layers gives its own logits, bit for bit, and a route with repeats
    generates with a cache what it does without one and leaves the model as it was. A few forwards of 12 tokens."""
    try:
        reason = _by_numbers(model)
    except _REFUSALS as error:
        reason = f"with repeated layers does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason:
        raise RouteError(f"{type(model).__name__} {reason}; it cannot be routed")


def check_scalable(model: nn.Module) -> None:
    """Raises FoldError unless gains do what scaled hidden states do: in each layer, see `folding.check_scalable`, and in the logits of the
    model with seven random scales in [0.4, 1.5]. Norms whose epsilon is not small beside a scaled hidden state fail there."""
    folding.check_scalable(model)
    try:
        error = _scaled_error(model)
    except _REFUSALS as raised:
        raise FoldError(f"{type(model).__name__} with scaled hidden states does not run: {type(raised).__name__}: {raised}") from raised
    most = max(_SCALED, _ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)
    if not error <= most:
        raise FoldError(
            f"{type(model).__name__}: gains in its weights and scaled hidden states differ by {error:.1e} of the logits' deviation, at most "
            f"{most:.0e} is exact, the epsilon of its norms is not small beside them; scales are not possible, set `scales: none`"
        )


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
        setattr(self.module, self.name, depth if self.key is None else list(lists[self.key]) if self.key in lists else None)


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
            found = folding.scaled(weight.detach(), *folding.factor(self.fold, self.name, self.shared.gain))
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
        fold = folding.fold_of(hop.model, hop.layer)
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
    replaced: dict[int, Any] = {id(own): new for own, new in _pairs(shell.model.config, config)} | {id(shell.layers): nn.ModuleList()}
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
        for key in [k for k, hook in own["_forward_hooks"].items() if getattr(hook, "__name__", "") == "output_capturing_hook"]:
            del own["_forward_hooks"][key]
        if own.get("_output_capturing_hooks_installed"):
            own["_output_capturing_hooks_installed"] = False


# ---- checks ----------------------------------------------------------------------------------------------------------------

_WHAT = ("the class of the stack", "the attention implementation", "the width")


def _by_numbers(model: nn.Module) -> str | None:
    """What a routed model does wrong."""
    depth = len(stack(model)[1])
    routed = Routed(model)
    tokens = sample(model)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    own, found = _logits(model, tokens, mask), _logits(routed.model, tokens, mask)
    if not torch.equal(own, found):
        error = float((own - found).abs().max() / own.float().std())
        return f"routed through its own layers differs from itself by {error:.1e} of its logits' deviation"
    expected = _cache_error(model, tokens[1:])
    longer = [*range(depth), depth - 1, 0]
    longer += [i % depth for i in range(_LONG - len(longer))]
    routed.install([Hop(model, i) for i in longer])
    error = _cache_error(routed.model, tokens[1:])
    if not error <= 10 * expected + 1e-3:
        return f"with repeated layers generates other logits with its cache than without, by {error:.1e} of their deviation ({expected:.1e} as it is)"
    if (broken := _broken(routed.model, tokens)) is not None:
        return f"changes the hidden state between layers {broken} and {broken + 1} of a route"
    if not torch.equal(own, _logits(model, tokens, mask)):
        return "is changed by a route through its layers: it writes to its weights in a forward"
    return None


def _broken(model: nn.Module, tokens: Tensor) -> int | None:
    """The first layer whose output is not what the next one reads."""
    left: list[Tensor] = []

    def note(module: nn.Module, read: Any, out: Any) -> None:
        left.append(out[0] if isinstance(out, (tuple, list)) else out)

    handles = [layer.register_forward_hook(note) for layer in stack(model)[1]]
    entered = [call.hidden for call in calls(model, tokens)[1:]]
    for handle in handles:
        handle.remove()
    return next((i for i, (out, read) in enumerate(zip(left, entered, strict=False)) if not torch.equal(out, read)), None)


def _scaled_error(model: nn.Module) -> float:
    """Largest difference of the logits between gains in the weights and scaled hidden states, of their deviation."""
    tokens, depth = sample(model), len(stack(model)[1])
    mask, random = torch.ones_like(tokens), torch.Generator().manual_seed(0)
    layers = [*range(depth), *(i % depth for i in range(_LONG - depth))]
    routed, worst = Routed(model), 0.0
    for _ in range(_DRAWS):
        scales = [1.0] * len(layers)
        for i in range(1, _LONG):
            scales[i * (len(layers) - 1) // (_LONG - 1)] = 0.4 + 1.1 * float(torch.rand((), generator=random))
        routed.install([Hop(model, i) for i in layers])
        hooked = zip(stack(routed.model)[1], scales, strict=True)
        handles = [layer.register_forward_pre_hook(_multiplied(by), with_kwargs=True) for layer, by in hooked]
        try:
            expected = _logits(routed.model, tokens, mask)
        finally:
            for handle in handles:
                handle.remove()
        routed.install([Hop(model, i, gain) for i, gain in zip(layers, gains(scales, len(layers)), strict=True)])
        error = float((_logits(routed.model, tokens, mask).float() - expected.float()).abs().max() / expected.float().std())
        worst = max(worst, error if error == error else math.inf)
    return worst


def _multiplied(by: float) -> Callable[..., Any]:
    """A hook that multiplies the hidden state as it enters a layer."""

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (given[0] * by, *given[1:]), named
        return given, {**named, "hidden_states": named["hidden_states"] * by}

    return hook


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return found


def _kind(of: Source) -> tuple[Any, ...]:
    return type(of.owner).__name__, of.text._attn_implementation, of.text.hidden_size


def _check_rotary(name: str, own: Source, base: str, shell: Source) -> None:
    mine, expected = _rotary(own), _rotary(shell)
    keys = sorted(key for key in mine.keys() | expected.keys() if not _same(mine.get(key), expected.get(key)))
    if keys:
        raise RouteError(f"the rotary embeddings of '{name}' and '{base}' differ in {', '.join(keys[:3])}; their layers cannot be stacked")


def _rotary(of: Source) -> dict[str, Any]:
    """Buffers and numbers of the modules that the stack's owner gives to all its layers, such as rotary embeddings."""
    found: dict[str, Any] = {}
    for path, module in of.owner.named_modules():
        if not path or f"{of.stack_name}." in f"{path}." or any(True for _ in module.parameters()):
            continue
        found |= {f"{path}.{k}": v for k, v in module._buffers.items() if v is not None}
        found |= {f"{path}.{k}": v for k, v in vars(module).items() if isinstance(v, (float, str)) and not k.startswith("_")}
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"):
        if getattr(of.text, key, None) is not None:
            found[key] = getattr(of.text, key)
    return found


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _cache_error(model: nn.Module, tokens: Tensor, steps: int = 3) -> float:
    """Largest difference between the logits of greedy generation with and without a cache, of the uncached logits' deviation."""
    from transformers import GenerationConfig

    found = []
    for cached in (True, False):
        asked = GenerationConfig(
            max_new_tokens=steps, do_sample=False, use_cache=cached, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        found.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=asked))  # type: ignore[operator]
    worst = 0.0
    for i, (a, b) in enumerate(zip(found[0].logits, found[1].logits, strict=False)):
        length = tokens.shape[1] + i
        if not torch.equal(found[0].sequences[:, :length], found[1].sequences[:, :length]):
            break
        worst = max(worst, float((a - b).abs().max() / b.float().std()))
    return worst
