"""LoRA adapters written by hand for the tiny models, and what they are to give, one entry at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
Q, V, DOWN = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.3.mlp.down_proj",
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {Q: (32, 32), V: (16, 32), DOWN: (32, 48), EMBEDDING: (64, 32), HEAD: (64, 32)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def pair(
    module: str, rank: int = 4, *, shape: tuple[int, int] | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """A and B of one module, under the names that peft gives them."""
    rows, columns = shape or SHAPES[module]
    a, b = noise(rank, columns, seed=seed), noise(rows, rank, seed=seed + 100)
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def embedding(rank: int = 4) -> dict[str, torch.Tensor]:
    rows, columns = SHAPES[EMBEDDING]
    return {
        f"{PREFIX}{EMBEDDING}.lora_embedding_A": noise(rank, rows, seed=7),
        f"{PREFIX}{EMBEDDING}.lora_embedding_B": noise(columns, rank, seed=8),
    }


def adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj"],
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def looped(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool = False
) -> torch.Tensor:
    """W + scale B A in float64, one entry at a time. a: [r, in], b: [out, r]."""
    out = weight.double().clone()
    for i in range(b.shape[0]):
        for j in range(a.shape[1]):
            total = math.fsum(float(b[i, k]) * float(a[k, j]) for k in range(a.shape[0]))
            out[(j, i) if transposed else (i, j)] += scale * total
    return out


def tensors_of(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"]
