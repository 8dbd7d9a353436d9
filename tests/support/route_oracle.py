"""What a route must compute: physically copied models, hidden states really scaled, generation without a
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.routed_model import Hop, routed_config

MIXED = ((0, 0), (1, 1), (0, 2), (1, 1), (1, 3), (0, 2), (0, 3))
"""(model, layer): two parents, out of order, with repeats."""
PERIODIC = ((1, 0), (0, 1), (1, 2), (0, 3), (0, 0), (0, 1), (1, 2), (1, 3))
"""The same for models whose config repeats a pattern of layers: each layer at a position of its own phase."""
LEADING = ((1, 0), (0, 1), (1, 3), (0, 2), (0, 2), (1, 2), (0, 3))
"""The same for models whose first two layers are of another kind."""
IN_PLACE = ((1, 0), (0, 1), (1, 2), (0, 3))
"""Every layer at its own number, for models whose layers compute with it."""
SCALES = (1.0, 0.62, 1.35, 0.48, 1.21, 0.9, 1.4, 0.7)


def hops(
    models: Sequence[nn.Module], route: Sequence[tuple[int, int]], gains: Sequence[float] | None = None
) -> list[Hop]:
    return [Hop(models[m], layer, 1.0 if gains is None else gains[i]) for i, (m, layer) in enumerate(route)]


def copied(shell: nn.Module, path: str, route: Sequence[Hop], config: Any = None) -> nn.Module:
    """A model of its own with copies of the route's weights, gains folded in, as a checkpoint would hold
    them. path: of the stack.
    """
    config = copy.deepcopy(routed_config(shell, route) if config is None else config)
    made = type(shell)._from_config(config, attn_implementation=shell.config._attn_implementation)
    made = made.to(next(shell.parameters()).dtype).eval()
    state = {k: v.clone() for k, v in shell.state_dict().items() if not k.startswith(path + ".")}
    for i, hop in enumerate(route):
        layer = hop.model.get_submodule(path)[hop.layer]
        state |= {f"{path}.{i}.{k}": v.clone() for k, v in layer.state_dict().items()}
        if hop.gain != 1:
            fold = scale_folding.fold_of(hop.model, hop.layer)
            state |= {f"{path}.{i}.{k}": v for k, v in scale_folding.folded(layer, fold, hop.gain).items()}
    made.load_state_dict(state)
    return made


def scale(model: nn.Module, path: str, scales: Sequence[float]) -> list[Any]:
    """Hooks that multiply the hidden state as it enters each layer; handles to take them off."""

    def hook(by: float) -> Any:
        def multiply(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (args[0] * by, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * by}

        return multiply

    layers = model.get_submodule(path)
    return [
        layer.register_forward_pre_hook(hook(by), with_kwargs=True)
        for layer, by in zip(layers, scales, strict=True)
    ]


def batch(rows: int = 2, length: int = 20, padding: int = 5) -> dict[str, Tensor]:
    """Token ids, the first row padded on the left; longer than the windows of the tiny models."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ids[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, of the expected values' standard deviation."""
    return float((found.float() - expected.float()).abs().max() / expected.float().std())


def generated(
    model: nn.Module, inputs: Mapping[str, Tensor], cached: bool, steps: int = 6
) -> tuple[Tensor, list[Tensor]]:
    """(tokens, logits of each step) of greedy generation."""
    from transformers import GenerationConfig

    asked = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        use_cache=cached,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    found = model.generate(**inputs, generation_config=asked)
    return found.sequences, list(found.logits)
