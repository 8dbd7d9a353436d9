"""The protocol of a text engine, and the values that travel between it and the live model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Push = Literal["auto", "in-place", "reload"]


class EngineError(RuntimeError):
    """An engine that lives refused or failed at what it was asked; the machine's fault unless it repeats."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine is opened, from the search file's `evaluation.engine` and the environment.

    Attributes:
        python: Interpreter of the environment that has the engine; None for this one.
        process: 'child' for a process of its own, 'worker' for this one.
        push: How weights get into it; 'auto' writes in place where every tensor is found.
        rows: Most prompts that run at once.
        cache: Bytes for keys and values.
        tensor_parallel: Devices that share the model.
        threads: CPU threads of a child.
        options: Further arguments of vLLM's `LLM`.
    """

    python: str | None = None
    process: Literal["child", "worker"] = "child"
    push: Push = "auto"
    rows: int = 256
    cache: int = 1 << 30
    tensor_parallel: int = 1
    threads: int = 1
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What an engine opens, without weights.

    Attributes:
        folder: Holds the model's config.json.
        dtype: Such as 'bfloat16'.
        device: Such as 'cpu' or 'cuda:0'.
        max_length: Most tokens of a prompt and its answer.
    """

    folder: str
    dtype: str
    device: str
    max_length: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did.

    Attributes:
        way: 'in-place' or 'reload'.
        reason: Why that way.
        tensors: How many were written.
        bytes: Their size.
    """

    way: str
    reason: str
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """New tokens of a row.

    Attributes:
        row: Number of its prompt.
        tokens: New token ids.
        logprobs: Log-probability of each, in nats, in float32 or better.
        is_finished: Whether the row ended: by a stop token, which is among its tokens, or its limit.
    """

    row: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_finished: bool


class TextEngine(Protocol):
    """Generates texts greedily with weights that it is given.

    One set of prompts runs at a time. After an exception the engine is closed and another one opened.
    """

    def facts(self) -> Mapping[str, str]:
        """What texts may depend on: the engine's name and version, and how it computes."""
        ...

    def push(self, tensors: Mapping[str, Tensor]) -> Pushed:
        """Takes weights over, and forgets all keys and values computed with earlier ones.

        Args:
            tensors: Name on disk -> tensor; the first time all of them, later perhaps those alone of whole
                decoder layers of which one changed. They are not kept.

        Returns:
            What was done.

        Raises:
            EngineError: A tensor does not fit.
        """
        ...

    def start(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], end_ids: Sequence[int]) -> None:
        """Begins to generate.

        Args:
            prompts: Token ids of each row.
            limits: Most new tokens of each row.
            end_ids: Token ids that end a row.
        """
        ...

    def step(self) -> list[Progress]:
        """Generates for a moment: usually one token of each running row.

        Returns:
            The progress of rows; possibly none although rows run.
        """
        ...

    def abort(self, rows: Sequence[int]) -> None:
        """Ends running rows, of which nothing is reported any more.

        Args:
            rows: Their numbers.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


class EngineFactory(Protocol):
    """Opens an engine, in the process that it is called in."""

    def __call__(self, model: EngineModel, settings: EngineSettings) -> TextEngine:
        """Opens an engine.

        Args:
            model: What it opens.
            settings: How.

        Returns:
            The engine, with any weights.

        Raises:
            EngineError: It cannot be opened.
        """
        ...


def find_factory(path: str) -> EngineFactory:
    """Imports what opens an engine.

    Args:
        path: 'module:name'.

    Returns:
        The factory.
    """
    module, _, name = path.partition(":")
    factory: EngineFactory = getattr(importlib.import_module(module), name)
    return factory


def layer_of(name: str) -> str:
    """The decoder layer of a tensor: engines keep some tensors of a layer as one, and pack them together.

    Args:
        name: Name on disk, such as 'model.layers.3.self_attn.q_proj.weight'.

    Returns:
        The name up to its first number; the whole name of a tensor outside of layers.
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return name
