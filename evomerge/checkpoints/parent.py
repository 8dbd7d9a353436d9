"""What the engine asks of a parent model, and whether two parents can be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from evomerge.checkpoints.safetensors_headers import TensorInfo as TensorInfo
from evomerge.errors import CheckpointError

Part = Literal["embeddings", "layer", "head", "tower"]
COMPONENTS = ("attention", "mlp", "other")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs. layer: index in the decoder stack, None outside it; suffix: name after 'stack.N.'.

    A 'tower' tensor is no part of the language model: a vision tower, a projector.
    """

    part: Part
    layer: int | None
    component: str
    suffix: str


class Parent(Protocol):
    """What a merge reads: a checkpoint, or a checkpoint with an adapter folded in."""

    @property
    def path(self) -> Path:
        """Folder of the config, the tokenizer and the weights before any adapter."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors, an adapter's too."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Tensor name -> header facts."""

    @property
    def num_layers(self) -> int:
        """Depth of the decoder stack."""

    @property
    def stack(self) -> str:
        """Prefix of the decoder stack's tensors, such as 'model.layers'."""

    @property
    def dtype(self) -> str:
        """The type of most of its tensors, in torch's name."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""

    def tensor(self, name: str, /) -> Tensor:
        """The tensor of that name; never written to."""

    def place(self, name: str, /) -> Place:
        """Part, layer and component that a tensor's name says."""

    def layer_name(self, layer: int, suffix: str, /) -> str:
        """Full name of a layer's tensor."""

    def layer_suffixes(self, layer: int, /) -> tuple[str, ...]:
        """Names after 'stack.N.' of one layer's tensors, sorted."""

    def outer_names(self, part: Part, /) -> tuple[str, ...]:
        """Names of the tensors of one part outside the stack, sorted."""

    def content_hash(self) -> str:
        """What a study remembers it by."""

    def equal_tensors(self, other: Parent, /) -> Iterator[str]:
        """Names of the tensors that are the same in both."""


def equal(one: Parent, other: Parent) -> Iterator[str]:
    """Names of the tensors that two parents have in the same shape, type and values."""
    for name, info in one.tensors.items():
        twin = other.tensors.get(name)
        if (
            twin
            and (twin.shape, twin.dtype) == (info.shape, info.dtype)
            and torch.equal(one.tensor(name), other.tensor(name))
        ):
            yield name


def check_compatible(parents: Mapping[str, Parent], base: str) -> None:
    """Raises CheckpointError unless every parent has the base's tensors in the base's shapes, layer for layer."""
    expected = parents[base]
    for name, parent in parents.items():
        for tensor, info in expected.tensors.items():
            found = parent.tensors.get(tensor)
            if found is None:
                raise CheckpointError(
                    f"model '{name}' lacks the tensor '{tensor}' of base '{base}'; the architectures differ"
                )
            if found.shape != info.shape:
                place = expected.place(tensor)
                advice = "the vocabularies differ" if place.layer is None else "the architectures differ"
                raise CheckpointError(
                    f"'{tensor}' is {list(found.shape)} in model '{name}' and {list(info.shape)} in base '{base}'; {advice}"
                )
