"""Tiny random vision-language models of many architectures, built from transformers' own configs. Knows
nothing of evomerge.

The language towers are those of `text_architectures`; weights are random and of effect in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.support.text_architectures import _DENSE, _EXPERTS, EOS, HIDDEN, PAD, WINDOW

_TOWER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
}
_LLAMA: dict[str, Any] = {**_DENSE, "model_type": "llama"}
_IMAGE = {"image_token_id": 120, "image_token_index": 120}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": _LLAMA, "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
        **_IMAGE},
    "llava_next": {"text_config": _LLAMA, "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
        **_IMAGE},
    "llava_onevision": {
        "text_config": {**_DENSE, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"}, **_IMAGE,
        "video_token_id": 121,
    },
    "vipllava": {
        "text_config": _LLAMA, "vision_config": {**_TOWER, "model_type": "clip_vision_model"}, **_IMAGE,
        "vision_feature_layers": [-1, -2],
    },
    "qwen2_vl": {"text_config": {**_DENSE, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN, "hidden_size": HIDDEN}, **_IMAGE},
    "qwen2_5_vl": {"text_config": {**_DENSE, "rope_parameters": _MROPE}, "vision_config": _QWEN, **_IMAGE},
    "qwen3_vl": {
        "text_config": {**_DENSE, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1]}, **_IMAGE,
    },
    "qwen3_vl_moe": {
        "text_config": {**_DENSE, **_EXPERTS, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1]}, **_IMAGE,
    },
    "gemma3": {
        "text_config": {**_DENSE, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": {**_TOWER, "num_hidden_layers": 4}, "mm_tokens_per_image": 4, **_IMAGE,
    },
    "paligemma": {
        "text_config": {**_DENSE, "model_type": "gemma"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
        "projection_dim": HIDDEN, **_IMAGE,
    },
    "mistral3": {
        "text_config": {**_DENSE, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8}, **_IMAGE,
    },
    "idefics3": {"text_config": _LLAMA, "vision_config": _TOWER, "scale_factor": 2, **_IMAGE},
    "smolvlm": {"text_config": _LLAMA, "vision_config": _TOWER, "scale_factor": 2, **_IMAGE},
    "internvl": {
        "text_config": {**_DENSE, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "model_type": "internvl_vision", "image_size": [28, 28],
            "patch_size": [14, 14]}, **_IMAGE,
    },
    "aya_vision": {
        "text_config": {**_DENSE, "model_type": "cohere2", "sliding_window": WINDOW},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"}, **_IMAGE,
    },
    "glm4v": {
        "text_config": {**_DENSE, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**_QWEN, "hidden_size": HIDDEN, "image_size": 28}, **_IMAGE,
    },
    "llama4": {
        "text_config": {
            **_DENSE, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        "vision_config": {**_TOWER, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16}, **_IMAGE,
    },
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in evaluation mode; the same arguments give the same weights. Raises KeyError for an
    unknown name.
    """
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = CONFIG_MAPPING[name](**CONFIGS[name])
    torch.manual_seed(1000 + seed)  # what a model draws beside its parameters
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
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
