"""A tiny Qwen2 model in a GGUF file, some tensors quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WIDTH, INNER, LAYERS, HEADS, KV = 64, 96, 2, 4, 2
TOKENS = ["<|endoftext|>", *(chr(33 + i) for i in range(62)), "!!"]
HF_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight", "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight", "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF's tensor names -> shapes, as numpy has them."""
    side = WIDTH // HEADS * KV
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), WIDTH),
        "output.weight": (len(TOKENS), WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        stem = f"blk.{layer}"
        found |= {f"{stem}.attn_{n}.weight": (WIDTH if n == "q" else side, WIDTH) for n in "qkv"}
        found |= {f"{stem}.attn_{n}.bias": (WIDTH if n == "q" else side,) for n in "qkv"}
        found |= {f"{stem}.attn_output.weight": (WIDTH, WIDTH), f"{stem}.ffn_down.weight": (WIDTH, INNER)}
        found |= {f"{stem}.ffn_{n}.weight": (INNER, WIDTH) for n in ("gate", "up")}
        found |= {f"{stem}.{n}_norm.weight": (WIDTH,) for n in ("attn", "ffn")}
    return found


def hf_name(name: str) -> str:
    """What transformers calls a tensor."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest]}"


def write(file: Path, seed: int = 0, architecture: str = "qwen2") -> dict[str, np.ndarray[Any, Any]]:
    """Writes the model; matrices of the layers in Q8_0, the rest in float32.

    Returns the dequantised tensors by transformers' names.
    """
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_license("apache-2.0")
    writer.add_base_model_count(2)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/start")
    writer.add_base_model_repo_url(1, "https://elsewhere.example/org/other")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges(["! !"])
    for kind in ("bos", "eos", "pad"):
        getattr(writer, f"add_{kind}_token_id")(0)
    values = {}
    for name, shape in shapes().items():
        own = rng.normal(0, 0.05, shape).astype(np.float32)
        if name.startswith("blk.") and len(shape) == 2:
            packed = gguf.quants.quantize(own, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            own = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, own)
        values[hf_name(name)] = own
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
