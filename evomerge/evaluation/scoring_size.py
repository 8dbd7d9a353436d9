"""What scoring takes of a card's memory, from a model's config and the budgets of a forward there.

Upper bounds on paper; none was compared with a card yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.evaluation.budgets import CPU, of_card
from evomerge.merging.memory_plan import ScoringSize

_MLP_COPIES, _STREAM_COPIES = 4, 3  # gate, its activation, up, product; residual, normed, output
_LOGIT_BYTES = 4  # of an element, as float32


def scoring_size(config: Mapping[str, Any], item_bytes: int, layers: int, card: int) -> ScoringSize:
    """What scoring a model takes.

    Args:
        config: The model's config.json.
        item_bytes: Bytes of an element of what it computes in.
        layers: Depth of its stack.
        card: Bytes of the first card's memory; 0 for a CPU.

    Returns:
        The size; a part that the config does not say counts as nothing.
    """
    text, budgets = config.get("text_config") or config, of_card(card) if card else CPU
    hidden = _number(text, "hidden_size", "n_embd")
    experts = _number(text, "moe_intermediate_size") * max(1, _number(text, "num_experts_per_tok"))
    inner = max(_number(text, "intermediate_size", "n_inner"), experts) or 4 * hidden
    return ScoringSize(
        activations=budgets.tokens * (_MLP_COPIES * inner + _STREAM_COPIES * hidden) * item_bytes,
        logits=_LOGIT_BYTES * min(budgets.logits, budgets.tokens * _number(text, "vocab_size")),
        kv_of_layer=-(-budgets.cache // max(1, layers)),
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first whole number above 0 of those names; 0 where there is none."""
    found = (config.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)
