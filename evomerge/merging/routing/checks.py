"""Whether a model's layers can be routed and scaled, decided by numbers at the start of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.refusals import REFUSALS
from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.decoder_layers import calls, sample, stack
from evomerge.merging.routing.layer_source import LayerSource, layer_source
from evomerge.merging.routing.routed_model import Hop, RoutedModel, gains

SCALED = 5e-4
"""Largest accepted difference between gains in a model's weights and scaled hidden states, of the logits'
deviation.
"""
_ROUNDINGS = 64  # of a type with few bits that may add up to such a difference
_DRAWS = 3  # of scales
_LONG = 8  # hops of the route that is tried, at least


def check_routable(models: Mapping[str, nn.Module], base: str) -> None:
    """Checks by structure that layers of several models can be stacked into the base's shell.

    Their stacks must be owned by the same class, be as wide, and rotate positions and compute attention
    alike: rotary embeddings belong to the stack, and a layer carries only its own weights.

    Args:
        models: Name -> live model, the base among them.
        base: Name of the base.

    Raises:
        RouteError: Something differs; names the model and what it is.
    """
    shell = layer_source(models[base])
    expected = _structure(shell)
    for name, model in models.items():
        for what, value in _structure(layer_source(model)).items():
            if value != expected[what]:
                raise RouteError(
                    f"{what} of '{name}' is {value}, of '{base}' {expected[what]}; their layers cannot be "
                    f"stacked, leave '{name}' out"
                )
    for name, model in models.items():
        _check_rotary(name, layer_source(model), base, shell)


def check_routable_numerically(model: nn.Module) -> None:
    """Checks by numbers that a model's layers can be routed; takes a few forwards of 12 tokens.

    A route of its own layers must give its own logits, bit for bit, and a route with repeats must generate
    with a cache what it does without one and leave the model as it was.

    Args:
        model: A live transformers model.

    Raises:
        RouteError: The model fails; says how.
    """
    try:
        reason = _routing_fault(model)
    except REFUSALS as error:
        first_line = str(error).partition("\n")[0]
        reason = f"with repeated layers does not run: {type(error).__name__}: {first_line}"
    if reason:
        raise RouteError(f"{type(model).__name__} {reason}; it cannot be routed")


def check_scalable(model: nn.Module) -> None:
    """Checks by numbers that gains do what scaled hidden states do.

    In each layer, see `scale_folding.check_scalable`, and in the logits of the model with seven random scales
    in [0.4, 1.5]. Norms whose epsilon is not small beside a scaled hidden state fail there.

    Args:
        model: A live transformers model.

    Raises:
        FoldError: The model fails; says how.
    """
    scale_folding.check_scalable(model)
    try:
        error = _scaled_error(model)
    except REFUSALS as refusal:
        raise FoldError(
            f"{type(model).__name__} with scaled hidden states does not run: {type(refusal).__name__}: "
            f"{refusal}"
        ) from refusal
    limit = max(SCALED, _ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps)
    if not error <= limit:
        raise FoldError(
            f"{type(model).__name__}: gains in its weights and scaled hidden states differ by {error:.1e} of "
            f"the logits' deviation, at most {limit:.0e} is exact, the epsilon of its norms is not small "
            "beside them; scales are not possible, set `scales: none`"
        )


def _structure(source: LayerSource) -> dict[str, Any]:
    """What has to be equal in the models of a route, under the words of the message."""
    return {
        "the class of the stack": type(source.owner).__name__,
        "the attention implementation": source.text._attn_implementation,
        "the width": source.text.hidden_size,
    }


def _routing_fault(model: nn.Module) -> str | None:
    """What a routed model does wrong, None for nothing."""
    depth = len(stack(model)[1])
    routed = RoutedModel(model)
    tokens = sample(model)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    own, through_route = _logits(model, tokens, mask), _logits(routed.model, tokens, mask)
    if not torch.equal(own, through_route):
        error = float((own - through_route).abs().max() / own.float().std())
        return f"routed through its own layers differs from itself by {error:.1e} of its logits' deviation"
    unrouted_error = _cache_error(model, tokens[1:])
    longer = [*range(depth), depth - 1, 0]
    longer += [i % depth for i in range(_LONG - len(longer))]
    routed.install([Hop(model, i) for i in longer])
    error = _cache_error(routed.model, tokens[1:])
    if not error <= 10 * unrouted_error + 1e-3:
        return (
            f"with repeated layers generates other logits with its cache than without, by {error:.1e} of "
            f"their deviation ({unrouted_error:.1e} as it is)"
        )
    changed = _changed_between_layers(routed.model, tokens)
    if changed is not None:
        return f"changes the hidden state between layers {changed} and {changed + 1} of a route"
    if not torch.equal(own, _logits(model, tokens, mask)):
        return "is changed by a route through its layers: it writes to its weights in a forward"
    return None


def _changed_between_layers(model: nn.Module, tokens: Tensor) -> int | None:
    """The first layer whose output is not what the next one reads, None if there is none."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)

    handles = [layer.register_forward_hook(note) for layer in stack(model)[1]]
    entered = [call.hidden for call in calls(model, tokens)[1:]]
    for handle in handles:
        handle.remove()
    for i, (output, hidden) in enumerate(zip(outputs, entered, strict=False)):
        if not torch.equal(output, hidden):
            return i
    return None


def _scaled_error(model: nn.Module) -> float:
    """Largest difference of logits between gains in weights and scaled hidden states, of their deviation."""
    tokens, depth = sample(model), len(stack(model)[1])
    mask, random = torch.ones_like(tokens), torch.Generator().manual_seed(0)
    layers = [*range(depth), *(i % depth for i in range(_LONG - depth))]
    routed, worst = RoutedModel(model), 0.0
    for _ in range(_DRAWS):
        scales = [1.0] * len(layers)
        for i in range(1, _LONG):
            scales[i * (len(layers) - 1) // (_LONG - 1)] = 0.4 + 1.1 * float(torch.rand((), generator=random))
        routed.install([Hop(model, i) for i in layers])
        hooked = zip(stack(routed.model)[1], scales, strict=True)
        handles = [
            layer.register_forward_pre_hook(_scaling_hook(scale), with_kwargs=True) for layer, scale in hooked
        ]
        try:
            expected = _logits(routed.model, tokens, mask)
        finally:
            for handle in handles:
                handle.remove()
        gained = zip(layers, gains(scales, len(layers)), strict=True)
        routed.install([Hop(model, i, gain) for i, gain in gained])
        difference = (_logits(routed.model, tokens, mask).float() - expected.float()).abs().max()
        error = float(difference / expected.float().std())
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _scaling_hook(scale: float) -> Callable[..., Any]:
    """A hook that multiplies the hidden state as it enters a layer."""

    def hook(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (arguments[0] * scale, *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"] * scale}

    return hook


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits


def _check_rotary(name: str, source: LayerSource, base: str, shell: LayerSource) -> None:
    rotary, expected = _rotary(source), _rotary(shell)
    keys = sorted(
        key for key in rotary.keys() | expected.keys() if not _is_equal(rotary.get(key), expected.get(key))
    )
    if keys:
        raise RouteError(
            f"the rotary embeddings of '{name}' and '{base}' differ in {', '.join(keys[:3])}; "
            "their layers cannot be stacked"
        )


def _rotary(source: LayerSource) -> dict[str, Any]:
    """Buffers and numbers of modules that all layers of a stack share, such as rotary embeddings."""
    facts: dict[str, Any] = {}
    for path, module in source.owner.named_modules():
        is_stack = f"{source.stack_name}." in f"{path}."
        if not path or is_stack or any(True for _ in module.parameters()):
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None:
                facts[f"{path}.{key}"] = buffer
        for key, value in vars(module).items():
            if isinstance(value, (float, str)) and not key.startswith("_"):
                facts[f"{path}.{key}"] = value
    for key in ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"):
        if getattr(source.text, key, None) is not None:
            facts[key] = getattr(source.text, key)
    return facts


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _cache_error(model: nn.Module, tokens: Tensor, steps: int = 3) -> float:
    """Largest difference of logits of greedy generation with and without a cache, of their deviation."""
    from transformers import GenerationConfig

    generations = []
    for use_cache in (True, False):
        config = GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        mask = torch.ones_like(tokens)
        generations.append(model.generate(tokens, attention_mask=mask, generation_config=config))  # type: ignore[operator]
    cached, uncached = generations
    worst = 0.0
    for i, (a, b) in enumerate(zip(cached.logits, uncached.logits, strict=False)):
        length = tokens.shape[1] + i
        if not torch.equal(cached.sequences[:, :length], uncached.sequences[:, :length]):
            break
        worst = max(worst, float((a - b).abs().max() / b.float().std()))
    return worst
