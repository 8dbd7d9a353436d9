"""The interface of a parent model, and functions over it: size, stored type, equality, compatibility."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evomerge.checkpoints.layout import Layout
from evomerge.checkpoints.safetensors_headers import TensorInfo


class Parent(Protocol):
    """A model that a merge reads: a checkpoint, a checkpoint with an adapter folded in, or a merge of others.

    Open one with `evomerge.checkpoints.open_parent`:

        parent = open_parent("org/model@main+org/lora")
        for name in parent.tensors:
            tensor = parent.tensor(name)
    """

    @property
    def path(self) -> Path:
        """Folder of the config, the tokenizer and the weights before any adapter."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors, those of an adapter included."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Tensor name -> shape, type and file, from the headers."""

    @property
    def layout(self) -> Layout:
        """Its tensor names, divided into parts and layers; holds the depth."""

    def tensor(self, name: str, /) -> Tensor:
        """Reads one tensor.

        Args:
            name: Name of the tensor on disk.

        Returns:
            The tensor, which must never be written to: it may be a view of a memory-mapped file.

        Raises:
            CheckpointError: There is no tensor of that name.
        """

    def content_hash(self) -> str:
        """SHA-256 by which a study recognises the model: equal for equal config and tensors."""


def equal_tensors(one: Parent, other: Parent) -> Iterator[str]:
    """Finds the tensors that two parents have in the same shape, type and values.

    Args:
        one: A parent.
        other: Another one.

    Yields:
        Names of the tensors that are equal in both, in the order of the first; one with a NaN is equal to
        nothing.
    """
    for name, info in one.tensors.items():
        twin = other.tensors.get(name)
        alike = twin is not None and (twin.shape, twin.dtype) == (info.shape, info.dtype)
        if alike and torch.equal(one.tensor(name), other.tensor(name)):
            yield name


def stored_dtype(parent: Parent) -> str:
    """The type of most of a parent's tensors.

    Args:
        parent: The parent; only its headers are used.

    Returns:
        torch's name of the type: 'bfloat16', 'float16', or 'float32' for any other.
    """
    kinds = Counter(info.dtype for info in parent.tensors.values())
    most_common = kinds.most_common(1)[0][0]
    return {"BF16": "bfloat16", "F16": "float16"}.get(most_common, "float32")


def total_bytes(parent: Parent) -> int:
    """The size of a parent's weights.

    Args:
        parent: The parent; only its headers are used.

    Returns:
        Bytes of all tensors together, as they are stored.
    """
    return sum(info.nbytes for info in parent.tensors.values())
