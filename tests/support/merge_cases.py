"""Merges of the tiny models, and comparisons of what they give: tensors by bits, folders by bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import METHODS
from evomerge.recipes import Recipe
from evomerge.spaces.weights import Range, WeightSpace


def space(method: str, out_dtype: str) -> WeightSpace:
    rule = METHODS[method]
    ranges = {p.name: Range(p.low, p.high, 0.4 * p.low + 0.6 * p.high) for p in rule.params if not p.flag}
    models = ("math", "code", "chat")[: rule.models[1]]
    segments = (("self_attn.", "attention"), (".mlp.", "mlp"))
    return WeightSpace(
        rule,
        "base",
        models,
        (1, 2, 1),
        ("attention", "mlp"),
        segments,
        ranges,
        out_dtype=out_dtype,
        searchable=bool(ranges),
    )


def candidate(method: str, seed: int = 0, out_dtype: str = "bfloat16") -> Recipe:
    of = space(method, out_dtype)
    recipe = of.decode(torch.randn(len(of.axes), generator=torch.Generator().manual_seed(seed)).tolist())
    return replace(recipe, seed=seed)


def live(path: Path) -> WeightMap:
    return WeightMap(load_model(path), Checkpoint(path).tensors)


def load_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert sorted(one) == sorted(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def files(path: Path) -> dict[str, str]:
    """Path in a folder -> digest, without what a merged folder says of its recipe."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in ("README.md", "mergekit_config.yml")
    }
