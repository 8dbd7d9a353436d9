"""Tiny models of many architectures for tests: a base and three fine-tunes each, on disk as on the Hub."""

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import NAMES, VOCABULARY, _random, _tokenizer

LAYERS = 4
_DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}  # as deep as the language tower
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {**_HEADS, "tie_word_embeddings": True},
    "gemma2": {**_HEADS, "tie_word_embeddings": True, "sliding_window": 16},
    "gemma3_text": {**_HEADS, "tie_word_embeddings": True, "sliding_window": 16, "sliding_window_pattern": 2},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llava": {
        "text": "llama",
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": LAYERS, **_VISION},
    },
    "gemma3": {
        "text": "gemma3_text",
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": LAYERS, **_VISION},
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text": "qwen2_5_vl_text",
        "vision_config": {
            "depth": LAYERS,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text": "qwen3_vl_text",
        "vision_config": {
            "depth": LAYERS,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
}
_TEXTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": KINDS["gemma3_text"],
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen3_vl_text": {**_HEADS, "rope_parameters": _MROPE},
}
VISION = tuple(kind for kind, settings in KINDS.items() if "text" in settings)


def build(
    folder: Path,
    kind: str,
    dtype: torch.dtype,
    names: tuple[str, ...] = NAMES,
    seed: int = 0,
    shards: str = "",
    **settings: Any,
) -> dict[str, Path]:
    """Saves a base and its fine-tunes under a folder; model name -> its folder. The same arguments give the
    same bits.

    shards: the most that one file holds, such as '20KB'; empty: one file a model; settings: of the config,
    beside those of KINDS, for language models.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = skeleton(kind, dtype, **settings)
    start = {key: tensor.clone() for key, tensor in _floats(model)}
    paths = {}
    for number, name in enumerate(names):
        with torch.no_grad():
            for i, (key, tensor) in enumerate(_floats(model)):
                norm = (
                    start[key] if tensor.dim() == 1 and key.endswith("weight") else 0
                )  # norms stay near their start: 1, or 0 in Gemma
                change = _random(seed * 100 + number, i, tensor.shape, 0.01) if number else 0
                tensor.copy_((_random(seed * 100, i, tensor.shape, 0.05) + norm).to(dtype) + change)
        paths[name] = folder / name
        model.save_pretrained(paths[name], **({"max_shard_size": shards} if shards else {}))
        _as_on_the_hub(paths[name], kind)
        _tokenizer().save_pretrained(paths[name])
    return paths


def skeleton(kind: str, dtype: torch.dtype, **further: Any) -> Any:
    """A model of that kind as transformers initialises it. further: settings of a language model's config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings = dict(KINDS[kind])
    text = settings.pop("text", None)
    if text is None:
        config = AutoConfig.for_model(kind, **{**_DENSE, **settings, **further})
        return AutoModelForCausalLM.from_config(config).to(dtype)
    tied = _TEXTS[text].get("tie_word_embeddings", False)
    inner = {"model_type": text, **_DENSE, **_TEXTS[text]}
    config = AutoConfig.for_model(
        kind, text_config=inner, image_token_id=5, tie_word_embeddings=tied, **settings
    )
    return AutoModelForImageTextToText.from_config(config).to(dtype)


def load(path: Path, kind: str, dtype: torch.dtype) -> Any:
    """The model of a folder as transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if kind in VISION else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def _floats(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and the buffers that are saved, tied ones once."""
    found, seen = [], set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            found.append((key, tensor.detach()))
    return found


def _as_on_the_hub(path: Path, kind: str) -> None:
    """What the hub's older repositories have and save_pretrained does not write.

    GPT-2: causal masks, no 'transformer.' prefix; GPT-NeoX: masks and rotary buffers; LLaVA, Gemma 3: one
    more level in the vision tower.
    """
    from safetensors.torch import load_file, save_file

    files = sorted(path.glob("*.safetensors"))
    if kind not in ("gpt2", "gpt_neox", "llava", "gemma3") or len(files) > 1:
        return
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(files[0]).items()}
    if not any(name.startswith("vision_tower.vision_model.") for name in tensors):
        tensors = {
            name.replace("vision_tower.", "vision_tower.vision_model."): tensor
            for name, tensor in tensors.items()
        }
    for layer in range(LAYERS if kind in ("gpt2", "gpt_neox") else 0):
        if kind == "gpt2":
            tensors[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        else:
            tensors[f"gpt_neox.layers.{layer}.attention.bias"] = (
                torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
            )
            tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
            tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, files[0], metadata={"format": "pt"})
