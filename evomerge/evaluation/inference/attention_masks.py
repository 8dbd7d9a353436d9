"""How a model's layers limit what a token sees (windows, chunks), and explicit masks that say the same by logical position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


@dataclass(frozen=True, slots=True)
class Windows:
    """window: a token sees those less than so many positions back; chunk: those in its own chunk of so many positions.

    types: the kinds of layers, sorted, where the config lists them (`layer_types`); else None, and one mask serves all.
    """

    window: int | None = None
    chunk: int | None = None
    types: tuple[str, ...] | None = None

    @property
    def span(self) -> int:
        """Prompts must be longer than this for a window or chunk to show at all."""
        return max(self.window or 0, self.chunk or 0)


def windows(model: nn.Module) -> Windows:
    """What the model's text config says of its layers."""
    root: Any = model.config
    config = root.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None)
    return Windows(
        window, getattr(config, "attention_chunk_size", None), tuple(sorted(set(types))) if types else None
    )


def attention_mask(
    limits: Windows, seen: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The additive mask [B, 1, Q, K] that transformers takes, one for each kind of layer where there are several.

    seen [B, Q, K]: what a query sees but for windows; queries [B, Q], keys [B, K]: logical positions. In the model's type:
    eager attention adds it to the scores.
    """

    def additive(allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]

    def windowed() -> Tensor:
        return seen & (queries[:, :, None] - keys[:, None, :] < limits.window) if limits.window else seen

    def chunked() -> Tensor:
        return (
            seen & (queries[:, :, None] // limits.chunk == keys[:, None, :] // limits.chunk)
            if limits.chunk
            else seen
        )

    if limits.types and len(limits.types) > 1:
        kinds = {SLIDING: windowed, CHUNKED: chunked}
        return {kind: additive(kinds[kind]() if kind in kinds else seen) for kind in limits.types}
    if limits.types == (SLIDING,) or (limits.types is None and limits.window):
        return additive(windowed())
    return additive(chunked() if limits.types == (CHUNKED,) else seen)
