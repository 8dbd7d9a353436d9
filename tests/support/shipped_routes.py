"""Routes over two tiny models for tests of what is shipped: recipe, live module, hops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from evomerge.checkpoints import Checkpoint
from evomerge.merging import model_loading
from evomerge.merging.routing.routed_model import Hop, RoutedModel, gains
from evomerge.recipes import Mix, Recipe
from tests.support import architectures, text_architectures

SIX = ("llama", "qwen3", "gemma2", "phi3", "olmo2", "mixtral")
ROUTE = (
    ("base", 0),
    ("math", 1),
    ("math", 2),
    ("math", 1),
    ("base", 2),
    ("base", 3),
)  # repeats, out of order, two parents, deeper
SCALES = (1.0, 0.7, 1.3, 1.1, 0.6, 1.4)


@dataclass(frozen=True)
class Case:
    """A route and the models that it is over. files: the models' folders; models: the same, live."""

    recipe: Recipe
    routed: RoutedModel
    hops: tuple[Hop, ...]
    files: dict[str, Checkpoint]
    models: dict[str, nn.Module]

    @property
    def donor(self) -> Path:
        return self.files["base"].path


def recipe(scaled: bool = True, dtype: str = "float32", route: tuple[tuple[str, int], ...] = ROUTE) -> Recipe:
    outer = Mix("passthrough", (("base", None),))
    layers = tuple(Mix("passthrough", (source,)) for source in route)
    return Recipe("base", layers, outer, outer, out_dtype=dtype, scales=SCALES if scaled else ())


def files(folder: Path, kind: str, dtype: str) -> dict[str, Checkpoint]:
    """'base' and 'math' of an architecture, written as on the hub."""
    if kind in architectures.KINDS:
        paths = architectures.build(folder, kind, getattr(torch, dtype), ("base", "math"))
    else:
        paths = {name: folder / name for name in ("base", "math")}
        for seed, path in enumerate(paths.values()):
            text_architectures.build(kind, getattr(torch, dtype), seed).save_pretrained(path)  # type: ignore[operator]
            text_architectures.tokenizer().save_pretrained(path)
    return {name: Checkpoint(path) for name, path in paths.items()}


def case(opened: dict[str, Checkpoint], scaled: bool = True, dtype: str = "float32") -> Case:
    models = {name: model_loading.load_base(file, dtype) for name, file in opened.items()}
    asked = recipe(scaled, dtype)
    hops = tuple(
        Hop(models[m], layer, gain)
        for (m, layer), gain in zip(ROUTE, gains(asked.scales, len(ROUTE)), strict=True)
    )
    routed = RoutedModel(models["base"])
    routed.install(hops)
    return Case(asked, routed, hops, opened, models)
