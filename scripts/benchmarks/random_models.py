"""A base of Qwen2's shapes with random weights and three perturbations of it, for benchmarks of merges."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = ("base", "one", "two", "three")


def make_models(scratch: Path, layers: int, vocabulary: int = 151_936, hidden: int = 896) -> list[Path]:
    """Writes four models in bfloat16 with configs that transformers builds; Qwen2-0.5B's width unless given.

    Args:
        scratch: Folder for theirs.
        layers: Of each.
        vocabulary: Rows of the embeddings, which are tied.
        hidden: Width of the model.

    Returns:
        Their folders, in the order of NAMES.
    """
    inner, heads, kv = hidden * 38 // 7 // 8 * 8, hidden // 64 or 1, 2 if hidden >= 128 else 1
    side = hidden // heads * kv
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {
            f"{stem}.self_attn.{p}_proj.weight": (hidden if p in "qo" else side, hidden) for p in "qkvo"
        }
        shapes |= {f"{stem}.self_attn.{p}_proj.bias": (hidden if p == "q" else side,) for p in "qkv"}
        shapes |= {f"{stem}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{stem}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }
    base: dict[str, torch.Tensor] = {}
    for number, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            tensors[key] = (noise * 0.02 if number == 0 else base[key].float() + noise * 0.001).bfloat16()
        base = base or tensors
        path = scratch / name
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return [scratch / name for name in NAMES]
