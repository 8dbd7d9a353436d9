"""What scoring takes of a card's memory at least, from a model's config: the budgets of one forward in bytes.

Upper bounds on paper; none was compared with a card yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.merging.memory_plan import ScoringSize

TOKENS = 16_384  # inputs of one forward
LOGITS = 1 << 30  # elements of logits that one forward may make, in float32
KV_TOKENS = 8_192  # tokens whose keys and values are kept at a time, at least
_MLP_COPIES, _STREAM_COPIES = 4, 3  # gate, its activation, up, product; residual, normed, output


def scoring_size(config: Mapping[str, Any], item_bytes: int) -> ScoringSize:
    """What scoring a model takes at least.

    Args:
        config: The model's config.json.
        item_bytes: Bytes of an element of what it computes in.

    Returns:
        The size; a part that the config does not say counts as nothing.
    """
    text = config.get("text_config") or config
    hidden, heads = _number(text, "hidden_size", "n_embd"), _number(text, "num_attention_heads", "n_head")
    kv_heads = _number(text, "num_key_value_heads") or heads
    width = _number(text, "head_dim") or (hidden // heads if heads else 0)
    experts = _number(text, "moe_intermediate_size") * max(1, _number(text, "num_experts_per_tok"))
    inner = max(_number(text, "intermediate_size", "n_inner"), experts) or 4 * hidden
    return ScoringSize(
        activations=TOKENS * (_MLP_COPIES * inner + _STREAM_COPIES * hidden) * item_bytes,
        logits=4 * min(LOGITS, TOKENS * _number(text, "vocab_size")),
        kv_of_layer=2 * KV_TOKENS * kv_heads * width * item_bytes,
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first whole number above 0 of those names; 0 where there is none."""
    found = (config.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), 0)
