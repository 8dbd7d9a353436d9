"""Where each tensor of a model belongs: before, in or after the decoder stack, or in another tower."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from evomerge.errors import CheckpointError

Part = Literal["embeddings", "layer", "head", "tower"]
COMPONENTS = ("attention", "mlp", "other")
"""The components into which the tensors of a layer are divided."""

_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "experts", "block_sparse_moe")
_EMBEDDINGS = ("embed", "wte", "wpe", "emb.")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor belongs, read off its name.

    Attributes:
        part: 'embeddings' before the decoder stack, 'layer' in it, 'head' after it, 'tower' for a tensor that
            is no part of the language model, such as one of a vision tower or a projector.
        layer: Index in the decoder stack, None outside it.
        component: One of `COMPONENTS`.
        suffix: The name after 'stack.N.' inside the stack, the whole name outside it.
    """

    part: Part
    layer: int | None
    component: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensor names of a model, divided into parts and layers. Made by `layout_of`.

    Attributes:
        owner: What error messages call the model, such as its folder.
        stack: Prefix of the decoder layers' tensors, such as 'model.layers'.
        num_layers: Depth of the decoder stack.
        towers: Names of the tensors outside the language model.
        suffixes: Layer -> names after 'stack.N.' of its tensors, sorted.
        outer: Part -> names of its tensors outside the stack, sorted.
    """

    owner: str
    stack: str
    num_layers: int
    towers: frozenset[str]
    suffixes: Mapping[int, tuple[str, ...]]
    outer: Mapping[Part, tuple[str, ...]]

    def place(self, name: str) -> TensorPlace:
        """Part, layer and component of a tensor.

        Args:
            name: Name of the tensor on disk; the model need not hold a tensor of that name.

        Returns:
            The place that the name stands for.
        """
        return _place(name, self.stack, self.towers)

    def layer_name(self, layer: int, suffix: str) -> str:
        """Full name of a layer's tensor.

        Args:
            layer: Index of the layer, from 0.
            suffix: Name of the tensor inside the layer.

        Returns:
            The name on disk, such as 'model.layers.3.mlp.up_proj.weight'.
        """
        return f"{self.stack}.{layer}.{suffix}"

    def layer_suffixes(self, layer: int) -> tuple[str, ...]:
        """Names of one layer's tensors inside the layer.

        Args:
            layer: Index of the layer, from 0 to `num_layers` - 1.

        Returns:
            The names after 'stack.N.', sorted.

        Raises:
            CheckpointError: There is no such layer.
        """
        suffixes = self.suffixes.get(layer)
        if not suffixes:
            raise CheckpointError(
                f"{self.owner} has no layer {layer}; its layers are 0 to {self.num_layers - 1}"
            )
        return suffixes

    def outer_names(self, part: Part) -> tuple[str, ...]:
        """Names of the tensors of one part outside the stack.

        Args:
            part: 'embeddings', 'head' or 'tower'.

        Returns:
            The names on disk, sorted.
        """
        return self.outer.get(part, ())


def layout_of(
    names: Iterable[str], stack: str, num_layers: int, towers: Collection[str], owner: str
) -> Layout:
    """Divides the tensor names of a model into parts and layers.

    Args:
        names: Names of all tensors on disk.
        stack: Prefix of the decoder layers' tensors.
        num_layers: Depth of the decoder stack.
        towers: Names of the tensors outside the language model.
        owner: What error messages call the model.

    Returns:
        The layout.
    """
    towers = frozenset(towers)
    outer: dict[Part, list[str]] = {}
    for name in sorted(names):
        place = _place(name, stack, towers)
        if place.layer is None:
            outer.setdefault(place.part, []).append(name)
    by_layer = suffixes_by_layer(names, stack, towers)
    return Layout(
        owner, stack, num_layers, towers, by_layer, {part: tuple(group) for part, group in outer.items()}
    )


def suffixes_by_layer(
    names: Iterable[str], stack: str, towers: Collection[str]
) -> dict[int, tuple[str, ...]]:
    """The tensors of each numbered layer of a stack.

    Args:
        names: Names of tensors on disk.
        stack: Prefix of the stack's tensors.
        towers: Names to leave out.

    Returns:
        Layer -> names after 'stack.N.', sorted.
    """
    layers: dict[int, list[str]] = {}
    for name in names:
        numbered = _split(name, stack)
        if numbered and name not in towers:
            layer, suffix = numbered
            layers.setdefault(layer, []).append(suffix)
    return {layer: tuple(sorted(suffixes)) for layer, suffixes in layers.items()}


def _place(name: str, stack: str, towers: Collection[str]) -> TensorPlace:
    if name in towers:
        return TensorPlace("tower", None, "other", name)
    numbered = _split(name, stack)
    if numbered:
        layer, suffix = numbered
        return TensorPlace("layer", layer, _component(suffix), suffix)
    part: Part = "embeddings" if any(word in name for word in _EMBEDDINGS) else "head"
    return TensorPlace(part, None, "other", name)


def _split(name: str, stack: str) -> tuple[int, str] | None:
    """(layer, suffix) of a name in the stack, None for one outside it."""
    if not name.startswith(stack + "."):
        return None
    index, _, suffix = name[len(stack) + 1 :].partition(".")
    return (int(index), suffix) if index.isascii() and index.isdigit() else None


def _component(suffix: str) -> str:
    head = suffix.split(".", 1)[0]
    if "norm" in head:  # input_layernorm, post_attention_layernorm
        return "other"
    if any(word in suffix for word in _ATTENTION):
        return "attention"
    return "mlp" if any(word in suffix for word in _MLP) else "other"
