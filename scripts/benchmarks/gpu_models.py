"""Models with random weights for scripts/benchmarks/gpu.py: real shapes, made on the device.

A parent's folder has its config and a safetensors file of which only the header is real (the rest is a hole
in the file); its tensors are views of an arena on the device.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.merging.arena import allocate_arena, arena_layout_of_headers
from evomerge.merging.live_model import ModelBuilder
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Mix, Recipe, params

NAMES = ("base", "a", "b", "c")
SIZES: dict[str, dict[str, Any]] = {
    "0.5 B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "7 B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
    },
    "odd": {
        "hidden_size": 48, "intermediate_size": 77, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 1003, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": True},
    "dare_ties": {"density": True},
    "della": {"density": True, "epsilon": 0.1},
    "breadcrumbs": {"density": True, "gamma": 0.01},
    "slerp": {},
}
_PIECE = 1 << 26  # elements of random numbers that are made at once


class ArenaParent:
    """A parent whose tensors lie in an arena on the device, over a folder with its header."""

    def __init__(self, checkpoint: Checkpoint, view: Mapping[str, Tensor]) -> None:
        self._checkpoint, self._view = checkpoint, view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def tensor(self, name: str) -> Tensor:
        return self._view[name]


@dataclass
class Models:
    """A base, three perturbations of it, and a live model of their shape.

    parents: where merges read them; files: as in their folders; parameters: of one model.
    """

    size: str
    device: str
    files: dict[str, Parent]
    parents: dict[str, Any]
    live: nn.Module
    parameters: int

    @property
    def nbytes(self) -> int:
        return 2 * self.parameters

    def builder(self, ranks_bytes: int = 0) -> ModelBuilder:
        """A builder with empty tables."""
        tables = MagnitudeTables(build=True, ranks_bytes=ranks_bytes)
        return ModelBuilder(self.files, self.parents, "base", self.live, "bfloat16", self.device, tables)


def make(size: str, scratch: Path, device: str, seed: int = 0) -> Models:
    """Models of a size, with the same weights on every device."""
    import transformers

    config = transformers.Qwen2Config(**SIZES[size], max_position_embeddings=4096)
    with torch.device(device):
        live = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    live.requires_grad_(False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {name: t for name, t in live.state_dict().items() if name not in tied}
    files: dict[str, Parent] = {}
    for name in NAMES:
        folder = scratch / size.replace(" ", "") / name
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        _write_header(folder / "model.safetensors", tensors)
        files[name] = Checkpoint(folder)
    layout = arena_layout_of_headers(files["base"].tensors)
    # the same numbers on every device: small models are drawn on the CPU
    drawn_on = "cpu" if size in ("tiny", "odd") else device
    generator = torch.Generator(drawn_on).manual_seed(seed)
    parents: dict[str, Any] = {}
    for name in NAMES:
        arena = allocate_arena(layout, device)
        base = None if name == "base" else parents["base"]
        for key, view in arena.view.items():
            _fill(view, None if base is None else base.tensor(key), generator, drawn_on)
        parents[name] = ArenaParent(files[name], arena.view)  # type: ignore[arg-type]
    for key, tensor in tensors.items():
        tensor.copy_(parents["base"].tensor(key))
    count = sum(tensor.numel() for tensor in tensors.values())
    return Models(size, device, files, parents, live, count)


def recipe(method: str, models: Models, seed: int) -> Recipe:
    """A candidate: other weights and densities for each seed, and for each of three parts of the depth."""
    rnd = random.Random(seed)
    depth = models.live.config.num_hidden_layers
    sources = ("a",) if method == "slerp" else NAMES[1:]
    groups = [_values(method, len(sources), rnd) for _ in range(4)]

    def mix(layer: int | None) -> Mix:
        given = groups[3] if layer is None else groups[3 * layer // depth]
        base = ("base", layer)
        if method == "linear":
            return Mix(method, (base, *((source, layer) for source in sources)), None, given)
        return Mix(method, tuple((source, layer) for source in sources), base, given)

    return Recipe("base", tuple(mix(i) for i in range(depth)), mix(None), mix(None), seed=seed)


def _values(method: str, count: int, rnd: random.Random) -> Any:
    more = dict(METHODS[method])
    if method == "slerp":
        return params({"t": round(rnd.uniform(0.2, 0.8), 3)})
    given: dict[str, Any] = {}
    count += method == "linear"
    given["weight"] = tuple(round(rnd.uniform(0.2, 1.0), 4) for _ in range(count))
    if more.pop("density", False):
        given["density"] = tuple(round(rnd.uniform(0.3, 0.8), 3) for _ in range(count))
    return params(given | more)


def _fill(view: Tensor, base: Tensor | None, generator: torch.Generator, drawn_on: str) -> None:
    """Random weights near a base's; a tenth of them unchanged."""
    flat = view.view(-1)
    near = None if base is None else base.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        part = flat[start : start + _PIECE]
        noise = torch.randn(part.shape, generator=generator, device=drawn_on).to(part.device)
        if near is None:
            part.copy_(noise * 0.02)
        else:
            part.copy_(near[start : start + _PIECE].float() + noise * 2e-3 * (noise.abs() > 0.12))


def _write_header(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
