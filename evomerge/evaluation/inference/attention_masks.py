"""Limits of what a token attends to (windows, chunks), and explicit masks by logical position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True, slots=True)
class Windows:
    """Limits of attention that a model's layers have.

    Attributes:
        window: A token attends to those less than so many positions back; None without a limit.
        chunk: A token attends to those in its own chunk of so many positions; None without a limit.
        types: The kinds of layers, sorted, where the config lists them (`layer_types`); None if one mask
            serves all layers.
    """

    window: int | None = None
    chunk: int | None = None
    types: tuple[str, ...] | None = None

    @property
    def span(self) -> int:
        """Prompts must be longer than this for a window or chunk to have an effect."""
        return max(self.window or 0, self.chunk or 0)


def windows(model: nn.Module) -> Windows:
    """Reads the limits of attention from a model's config.

    Args:
        model: A transformers model.

    Returns:
        What its text config declares.
    """
    root: Any = model.config
    config = root.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None)
    chunk = getattr(config, "attention_chunk_size", None)
    return Windows(window, chunk, tuple(sorted(set(types))) if types else None)


def attention_mask(
    limits: Windows, seen: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Builds the mask that transformers takes.

    Args:
        limits: The model's windows and chunks.
        seen: [B, Q, K] of bool, what each query may attend to before windows and chunks.
        queries: [B, Q] logical positions of queries.
        keys: [B, K] logical positions of keys.
        dtype: The model's type, in which eager attention adds the mask to the scores; bool for a mask that
            says what is attended, which scaled dot product attention takes.

    Returns:
        [B, 1, Q, K], 0 or the type's minimum, or True where attended; one for each kind of layer where the
        model has several.
    """

    def additive(allowed: Tensor) -> Tensor:
        if dtype == torch.bool:
            return allowed[:, None]
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    def windowed() -> Tensor:
        if not limits.window:
            return seen
        return seen & (queries[:, :, None] - keys[:, None, :] < limits.window)

    def chunked() -> Tensor:
        if not limits.chunk:
            return seen
        return seen & (queries[:, :, None] // limits.chunk == keys[:, None, :] // limits.chunk)

    if limits.types and len(limits.types) > 1:
        kinds = {SLIDING: windowed, CHUNKED: chunked}
        return {kind: additive(kinds[kind]() if kind in kinds else seen) for kind in limits.types}
    if limits.types == (SLIDING,) or (limits.types is None and limits.window):
        return additive(windowed())
    return additive(chunked() if limits.types == (CHUNKED,) else seen)
