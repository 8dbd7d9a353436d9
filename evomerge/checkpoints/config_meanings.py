"""What a difference of two configs means for a merge of the weights beside them, key by key.

A merge has the base's config. A number by which weights are cut or positions reach them makes the other
model's weights mean nothing there: such a difference is refused. Any other that is not harmless is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.checkpoints.refusals import REFUSALS

Verdict = Literal["refused", "named", "harmless"]
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a difference under a key of a config means.

    Attributes:
        verdict: 'refused': the merge is none; 'named': a warning; 'harmless': nothing is said.
        reason: Why.
    """

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A key under which two configs differ.

    Attributes:
        key: The key.
        one: Its value in the first, None where it is not given.
        two: Its value in the second.
        meaning: What that means.
    """

    key: str
    one: Any
    two: Any
    meaning: Meaning


_TABLE: tuple[tuple[Verdict, str, tuple[str, ...]], ...] = (
    (
        "refused",
        "the same matrices are cut into other heads",
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_head_dim", "head_dim"),
            *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups", "kv_channels"),
            *("multi_query", "multi_query_group_num", "new_decoder_architecture", "kv_n_heads"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
            *("mamba_n_heads", "mamba_d_head", "mamba_headdim", "n_mamba_heads", "linear_num_key_heads"),
            *("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        ),
    ),
    (
        "refused",
        "positions reach other parts of the same matrices",
        (
            *("rotary_dim", "rotary_pct", "partial_rotary_factor", "rotary_emb_fraction", "rope_interleave"),
            *("rope_interleaved", "alibi", "position_embedding_type", "position_encoding_type"),
        ),
    ),
    (
        "refused",
        "the parts of a layer are computed in another order",
        (
            *("use_parallel_residual", "parallel_attn", "parallel_residual", "do_layer_norm_before"),
            *("apply_residual_connection_post_layernorm", "is_decoder", "is_encoder_decoder"),
            *("use_bidirectional_attention",),
        ),
    ),
    (
        "named",
        "hidden states are scaled by another number, which the weights were trained with",
        (
            *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
            *("logit_scale", "scale_emb", "scale_depth", "dim_model_base", "query_pre_attn_scalar"),
            *("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "scale_attn_weights"),
            *("scale_attn_by_inverse_layer_idx", "routed_scaling_factor", "norm_topk_prob", "key_multiplier"),
            *("attention_in_multiplier", "attention_out_multiplier", "lm_head_multiplier", "mlp_multipliers"),
            *("ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier", "mup_multiplier"),
        ),
    ),
    (
        "named",
        "norms divide by another number",
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "norm_type"),
    ),
    (
        "named",
        "neurons have another activation",
        (
            *("hidden_act", "hidden_activation", "activation_function", "activation", "activation_type"),
            *("swiglu_alpha", "swiglu_limit", "mlp_hidden_act"),
        ),
    ),
    (
        "named",
        "positions have another rhythm",
        (
            *("rope_theta", "rope_scaling", "rope_local_base_freq", "mrope_section", "no_rope_layers"),
            *("no_rope_layer_interval", "original_max_position_embeddings", "use_mem_rope", "alibi_bias_max"),
        ),
    ),
    (
        "named",
        "attention sees other tokens",
        (
            *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
            *("attention_window_size", "window_size", "layer_types", "attention_chunk_size", "clip_qkv"),
            *("attention_types", "layers_block_type", "block_types"),
        ),
    ),
    (
        "named",
        "tokens are sent to other experts",
        (
            *("num_experts_per_tok", "moe_topk", "top_k_experts", "n_group", "topk_group", "topk_method"),
            *("scoring_func", "decoder_sparse_step", "mlp_only_layers", "first_k_dense_replace"),
            *("input_jitter_noise", "router_jitter_noise", "expert_layer_period", "expert_layer_offset"),
        ),
    ),
    (
        "named",
        "a model has tensors there that the other lacks",
        ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "use_qk_norm", "qk_layernorm"),
    ),
    (
        "harmless",
        "says who wrote the file and how it is loaded",
        (
            *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version"),
            *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "is_moe"),
            *("pretraining_tp", "slow_but_exact", "use_mamba_kernels", "use_mambapy", "use_mem_eff_path"),
            *("use_associative_scan", "init_device", "attn_implementation", "num_logits_to_keep"),
            *("chunk_size_feed_forward", "add_cross_attention", "unsloth_version", "unsloth_fixed"),
        ),
    ),
    (
        "harmless",
        "is of training alone",
        (
            *("initializer_range", "init_std", "initializer_factor", "initializer_cutoff_factor"),
            *("rescale_prenorm_residual", "w_init_variance_scale", "final_w_init_variance_scale"),
            *("router_aux_loss_coef", "aux_loss_alpha", "z_loss_coefficient", "output_router_logits"),
            *("layerdrop", "seq_aux", "router_z_loss_coef", "reorder_and_upcast_attn"),
        ),
    ),
    (
        "harmless",
        "is of classification heads, which no merge has",
        (
            *("id2label", "label2id", "problem_type", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params"),
            *("num_labels", "finetuning_task"),
        ),
    ),
    (
        "harmless",
        "bounds how long a text may be, not what weights mean",
        (
            *("max_position_embeddings", "max_sequence_length", "max_seq_len", "model_max_length"),
            *("n_positions", "n_ctx", "seq_length"),
        ),
    ),
    (
        "harmless",
        "is compared as tensors are: depth, vocabulary, head",
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "vocab_size", "tie_word_embeddings"),
    ),
)
MEANINGS: dict[str, Meaning] = {
    key: Meaning(verdict, reason) for verdict, reason, keys in _TABLE for key in keys
}
"""Key of a config -> what a difference means."""
UNKNOWN = Meaning("named", "may change what weights mean")
"""What a difference under any other key means."""
_ROPE = {"rope_scaling", "rope_parameters", "rope_theta"}
_HARMLESS_ENDS = ("_token_id", "_token_index", "_token_ids", "dropout", "_pdrop", "_drop")


def meaning_of(key: str) -> Meaning:
    """What a difference under a key means.

    Args:
        key: A key of a config.json.

    Returns:
        Its entry in `MEANINGS`; harmless for numbers of tokens, dropout and what begins with an underscore.
    """
    if key.startswith("_") or key.endswith(_HARMLESS_ENDS):
        return Meaning("harmless", "is of training, of tokens or of the library")
    return MEANINGS.get(key, UNKNOWN)


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[Difference]:
    """Finds what two configs say otherwise of the weights beside them, rotary positions first.

    A key that one of them leaves out, or both read in their own way, is compared by what transformers makes
    of it; it is loaded for that alone.

    Args:
        one: A config.json.
        two: Another one, the base's.

    Yields:
        The differences that are not harmless.
    """
    texts = (_text(one), _text(two))
    keys = sorted(
        key
        for key in {*texts[0], *texts[1]} - _ROPE
        if texts[0].get(key) != texts[1].get(key) and meaning_of(key).verdict != "harmless"
    )
    rope = list(_rope_differences(*texts))
    if not keys and not rope:
        return
    built = (built_text_config(one), built_text_config(two))
    if None not in built and _same(*(getattr(config, "rope_parameters", None) for config in built)):
        rope = []
    yield from rope
    for key in keys:
        values = (texts[0].get(key), texts[1].get(key))
        if _is_other_model(values):
            continue
        if all(hasattr(config, key) for config in built):
            values = (getattr(built[0], key), getattr(built[1], key))
            if _same(*values):
                continue
        elif not all(key in text for text in texts):
            continue  # nobody says what its class takes instead
        meaning = meaning_of(key)
        if meaning.verdict == "refused" and None in values:
            continue  # one class computes the number from others
        yield Difference(key, *values, meaning)


def built_text_config(config: Mapping[str, Any]) -> Any:
    """The text config that transformers makes of a file.

    Args:
        config: A config.json.

    Returns:
        A config of transformers; None if it does not know the model or refuses the file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        values = json.loads(json.dumps(dict(config)), object_hook=_special_float)
        built = CONFIG_MAPPING[config["model_type"]].from_dict(values)
        return built.get_text_config(decoder=True)
    except (StrictDataclassError, *REFUSALS):
        return None


def _special_float(value: dict[str, Any]) -> Any:
    """An infinity or NaN where transformers writes {'__float__': 'Infinity'}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _is_other_model(values: tuple[Any, Any]) -> bool:
    """Whether a value describes a tower of its own, whose tensors come from the base."""
    return any(isinstance(value, Mapping) and "model_type" in value for value in values)


def _same(one: Any, two: Any) -> bool:
    """Whether two values of configs are equal as JSON has them."""
    return bool(
        (list(one) if isinstance(one, tuple) else one) == (list(two) if isinstance(two, tuple) else two)
    )


def _rope_differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[Difference]:
    thetas = (_theta(one), _theta(two))
    if thetas[0] != thetas[1] and not {None, _DEFAULT_THETA} >= set(thetas):
        yield Difference("rope_theta", *thetas, MEANINGS["rope_theta"])
    scalings = (_scaling(one), _scaling(two))
    if scalings[0] != scalings[1]:
        yield Difference("rope_scaling", *scalings, MEANINGS["rope_scaling"])


def _theta(text: Mapping[str, Any]) -> float | None:
    """The base of the rotary frequencies, None where the config leaves it to its class."""
    nested = text.get("rope_parameters") or text.get("rope_scaling") or {}
    value = text.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    return float(value) if isinstance(value, int | float) else None


def _scaling(text: Mapping[str, Any]) -> Any:
    """How rotary positions are stretched, None where they are not."""
    nested = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(nested, dict):
        return None
    kind = nested.get("rope_type", nested.get("type", "default"))
    rest = {k: v for k, v in sorted(nested.items()) if k not in ("rope_theta", "rope_type", "type")}
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}
