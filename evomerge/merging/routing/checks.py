"""Whether a model's layers can be routed and scaled, decided by numbers at the start of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.decoder_layers import calls, sample
from evomerge.merging.routing.decoder_layers import stack as stack
from evomerge.merging.routing.layer_config import Source, source
from evomerge.merging.routing.layer_config import signature as signature
from evomerge.merging.routing.routed_model import REFUSALS, SCALED, Hop, Routed, gains

_ROUNDINGS = 64  # of a type with few bits that may add up to such a difference
_DRAWS = 3  # of scales
_LONG = 8  # hops of the route that is tried, at least


def check_routable(models: Mapping[str, nn.Module], base: str) -> None:
    """Raises RouteError, naming the model and what differs, unless layers of the models can be stacked into the base's shell.

    Their stacks must be owned by the same class, be as wide, and rotate positions and compute attention alike: rotary
    embeddings belong to the stack, and a layer carries only its own weights.
    """
    shell = source(models[base])
    for name, model in models.items():
        for what, own, expected in zip(_WHAT, _kind(source(model)), _kind(shell), strict=True):
            if own != expected:
                raise RouteError(
                    f"{what} of '{name}' is {own}, of '{base}' {expected}; their layers cannot be stacked, leave '{name}' out"
                )
    for name, model in models.items():
        _check_rotary(name, source(model), base, shell)


def routable_by_numbers(model: nn.Module) -> None:
    """Raises RouteError unless a route of a model's own layers gives its own logits, bit for bit, and a route with repeats
    generates with a cache what it does without one and leaves the model as it was. A few forwards of 12 tokens."""
    try:
        reason = _by_numbers(model)
    except REFUSALS as error:
        reason = (
            f"with repeated layers does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    if reason:
        raise RouteError(f"{type(model).__name__} {reason}; it cannot be routed")


def check_scalable(model: nn.Module) -> None:
    """Raises FoldError unless gains do what scaled hidden states do: in each layer, see `folding.check_scalable`, and in the logits of the
    model with seven random scales in [0.4, 1.5]. Norms whose epsilon is not small beside a scaled hidden state fail there."""
    scale_folding.check_scalable(model)
    try:
        error = _scaled_error(model)
    except REFUSALS as raised:
        raise FoldError(
            f"{type(model).__name__} with scaled hidden states does not run: {type(raised).__name__}: {raised}"
        ) from raised
    most = max(SCALED, _ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)
    if not error <= most:
        raise FoldError(
            f"{type(model).__name__}: gains in its weights and scaled hidden states differ by {error:.1e} of the logits' deviation, at most "
            f"{most:.0e} is exact, the epsilon of its norms is not small beside them; scales are not possible, set `scales: none`"
        )


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
    return next(
        (i for i, (out, read) in enumerate(zip(left, entered, strict=False)) if not torch.equal(out, read)),
        None,
    )


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
        routed.install(
            [Hop(model, i, gain) for i, gain in zip(layers, gains(scales, len(layers)), strict=True)]
        )
        error = float(
            (_logits(routed.model, tokens, mask).float() - expected.float()).abs().max()
            / expected.float().std()
        )
        worst = max(worst, error if error == error else math.inf)
    return worst


def _multiplied(by: float) -> Callable[..., Any]:
    """A hook that multiplies the hidden state as it enters a layer."""

    def hook(
        module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
        raise RouteError(
            f"the rotary embeddings of '{name}' and '{base}' differ in {', '.join(keys[:3])}; their layers cannot be stacked"
        )


def _rotary(of: Source) -> dict[str, Any]:
    """Buffers and numbers of the modules that the stack's owner gives to all its layers, such as rotary embeddings."""
    found: dict[str, Any] = {}
    for path, module in of.owner.named_modules():
        if not path or f"{of.stack_name}." in f"{path}." or any(True for _ in module.parameters()):
            continue
        found |= {f"{path}.{k}": v for k, v in module._buffers.items() if v is not None}
        found |= {
            f"{path}.{k}": v
            for k, v in vars(module).items()
            if isinstance(v, (float, str)) and not k.startswith("_")
        }
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
            max_new_tokens=steps,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        found.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=asked))  # type: ignore[operator]
    worst = 0.0
    for i, (a, b) in enumerate(zip(found[0].logits, found[1].logits, strict=False)):
        length = tokens.shape[1] + i
        if not torch.equal(found[0].sequences[:, :length], found[1].sequences[:, :length]):
            break
        worst = max(worst, float((a - b).abs().max() / b.float().std()))
    return worst
