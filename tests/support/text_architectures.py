"""Tiny random text models of many architectures, built from transformers' own configs, and a tokenizer for
all of them.

Weights are random and of effect: logits move by nats when a token does, norms and biases are not trivial.
Windows are 6 and chunks 16 tokens long, so that ordinary prompts exceed them. Knows nothing of evomerge.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, MAX_LENGTH = 128, 32, 64, 4, 256
PAD, BOS, EOS, WINDOW, CHUNK = 0, 1, 2, 6, 16
_MERGES = (
    "t h", "Ġ t", "h e", "i n", "e r", "Ġ a", "o n", "r e", "Ġt he", "Ġ s", "Ġ b", "o r", "a n", "e n", "Ġ 1",
    "Ġ 2", "Ċ Ċ", "Ċ Q", "Ġ A", "Q :",
    "A :", ". Ċ", "y Ċ",
)  # fmt: skip
# parts of é, ü and the euro sign in the alphabet of byte-level BPE, so that decoding may end within a letter
_BYTES = "Ã©¼âĤ¬"
_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}"
    "{% if not (loop.last and continue_final_message) %}\n[/]\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}[assistant]\n{% endif %}"
)
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    **_IDS,
}
_DENSE = {**_SIZES, **_HEADS, "max_position_embeddings": MAX_LENGTH}
_WHOLE = {
    k: v for k, v in _DENSE.items() if k not in ("num_key_value_heads", "head_dim")
}  # as many key heads as heads
_EQUAL = {**_WHOLE, "num_key_value_heads": 4}
_OLD = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": MAX_LENGTH,
    **_IDS,
}  # GPT-2's names
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

CONFIGS: dict[str, dict[str, Any]] = {
    # dense attention
    "llama": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma": _DENSE,
    "phi": _DENSE,
    "phi3": _DENSE,
    "gpt_neox": _DENSE,
    "olmo": _DENSE,
    "olmo2": _DENSE,
    "gpt2": _OLD,
    "cohere": {**_DENSE, "logit_scale": 1.0},
    "stablelm": _DENSE,
    "gpt_bigcode": _OLD,
    "starcoder2": _DENSE,
    "granite": {**_DENSE, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 1.5},
    "glm": {**_DENSE, "partial_rotary_factor": 0.5},
    "glm4": _DENSE,
    "smollm3": _DENSE,
    "gptj": {**_OLD, "rotary_dim": 4},
    "codegen": {**_OLD, "rotary_dim": 4},
    "minicpm3": {**_EQUAL, **_LATENT},
    "nemotron": _DENSE,
    "hunyuan_v1_dense": _DENSE,
    "seed_oss": _DENSE,
    "ernie4_5": _DENSE,
    "arcee": _DENSE,
    "helium": _DENSE,
    "apertus": _DENSE,
    "persimmon": _WHOLE,
    "bitnet": _DENSE,
    "biogpt": _WHOLE,
    "diffllama": _DENSE,
    "nanochat": _DENSE,
    "opt": {**_DENSE, "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN},
    "xglm": {
        **_IDS, "vocab_size": VOCABULARY, "d_model": HIDDEN, "ffn_dim": 64, "num_layers": LAYERS,
        "attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
    },
    "falcon": {**_WHOLE, "multi_query": True},
    # ALiBi
    "bloom": {**_IDS, "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "falcon_alibi": {**_WHOLE, "model_type": "falcon", "alibi": True, "multi_query": False},
    "mpt": {**_IDS, "vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4,
        "max_seq_len": MAX_LENGTH},
    # windows and chunks
    "mistral": {**_DENSE, "sliding_window": WINDOW},
    "ministral": {**_DENSE, "sliding_window": WINDOW, "layer_types": _SLIDING},
    "qwen2_swa": {**_DENSE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW,
        "max_window_layers": 2},
    "gemma2": {**_DENSE, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_DENSE, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": _SLIDING},
    "gemma3n_text": {
        **_DENSE, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "vaultgemma": {**_DENSE, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "cohere2": {**_DENSE, "sliding_window": WINDOW, "logit_scale": 1.0},
    "exaone4": {**_DENSE, "sliding_window": WINDOW},
    "olmo3": {**_DENSE, "sliding_window": WINDOW},
    "phi3_swa": {**_DENSE, "model_type": "phi3", "sliding_window": WINDOW},
    "gpt_oss": {**_DENSE, **_EXPERTS, "sliding_window": WINDOW},
    "gpt_neo": {
        **_IDS, "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4,
        "intermediate_size": 64,
        "window_size": WINDOW, "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": MAX_LENGTH,
    },
    "llama4_chunk": {
        **_DENSE, "model_type": "llama4_text", "intermediate_size_mlp": 64, "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "attention_chunk_size": CHUNK,
    },
    # mixtures of experts
    "mixtral": {**_DENSE, **_EXPERTS},
    "qwen2_moe": {**_DENSE, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_DENSE, **_EXPERTS},
    "granitemoe": {**_DENSE, **_EXPERTS},
    "olmoe": {**_DENSE, **_EXPERTS},
    "phimoe": {**_DENSE, **_EXPERTS},
    "deepseek_v3": {**_EQUAL, **_LATENT, **_ROUTED, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**_DENSE, **_ROUTED},
    "dots1": {**_DENSE, **_ROUTED},
    "ernie4_5_moe": {**_DENSE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {**_DENSE, **_EXPERTS, "moe_topk": 2},
    "llama4_text": {
        **_DENSE, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    # states: recurrent and hybrid
    "mamba": {**_SIZES, "state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {**_SIZES, "state_size": 8, "time_step_rank": 4},
    "mamba2": {**_SIZES, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2,
        "chunk_size": 8},
    "rwkv": {**_SIZES, "attention_hidden_size": HIDDEN, "context_length": MAX_LENGTH},
    "jamba": {
        **_DENSE, **_EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "recurrent_gemma": {**_DENSE, "lru_width": HIDDEN, "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"]},
    "bamba": {**_DENSE, **_SSD, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_DENSE, **_SSD, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_DENSE, **_SSD, **_EXPERTS, "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope",
    },
    "nemotron_h": {
        **_DENSE, "layers_block_type": ["mamba", "attention", "mamba", "attention"], "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False,
    },
    "zamba2": {
        **_EQUAL, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
        "chunk_size": 8, "mamba_expand": 2,
        "attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1, "use_mamba_kernels": False,
    },
    "qwen3_next": {**_DENSE, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32,
        "layer_types": _HYBRID},
    "qwen3_5_text": {**_DENSE, **_DELTA, "layer_types": _HYBRID},
    "qwen3_5_moe_text": {**_DENSE, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32,
        "layer_types": _HYBRID},
    "olmo_hybrid": {**_DENSE, **_DELTA, "layer_types": _HYBRID},
    "lfm2": {**_DENSE, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {**_DENSE, **_EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "minimax": {**_DENSE, **_EXPERTS, "layer_types": _HYBRID, "block_size": 8},
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in evaluation mode; the same arguments give the same weights. Raises KeyError for an
    unknown name.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    settings = dict(CONFIGS[name])
    config = CONFIG_MAPPING[settings.pop("model_type", name)](**settings)
    torch.manual_seed(1000 + seed)  # what a model draws beside its parameters
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:  # it has no such attention
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise * parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else parameter + 0.3 * noise
            )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    built: nn.Module = model.to(dtype).eval()
    return built


def tokenizer(*, bos: bool = False) -> Any:
    """A byte-level tokenizer of VOCABULARY tokens with a chat template. bos: whether encoding begins with the
    BOS token by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split()) for merge in _MERGES]
    letters = ["Ġ", "Ċ", *(chr(code) for code in range(33, 127)), *_BYTES]
    words = ["<pad>", "<s>", "</s>", *letters, *(a + b for a, b in merges)]
    if len(set(words)) != VOCABULARY:
        raise AssertionError(f"{len(set(words))} tokens, expected {VOCABULARY}")
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_LENGTH,
        chat_template=_CHAT,
    )
