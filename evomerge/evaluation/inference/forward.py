"""One forward of a live model, at the rows that are read: the only place that says how a model is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.attention_masks import Windows, windows
from evomerge.evaluation.inference.selected_logits import RowHead, device_of, dtype_of

LOGITS = 1 << 26  # elements of logits that one forward may make


class Forward:
    """A model's forward, perhaps over a cache. vocabulary: how many logits a row has."""

    def __init__(self, model: nn.Module, head: RowHead, pad_id: int) -> None:
        self.model, self.head, self.pad_id = model, head, pad_id
        self.device, self.dtype = device_of(model), dtype_of(model)
        self.limits: Windows = windows(model)
        self.vocabulary = vocabulary(model)
        self.argument = kv_cache.cache_argument(model)
        self.takes_positions = kv_cache.takes_positions(model)

    def __call__(
        self, rows: Tensor, ids: Tensor, past: Any, *, positions: Tensor | None = None, mask: Any = None
    ) -> Tensor:
        """Logits [N, V] of rows [N] of ids [B, S]; `past` grows by them. positions [B, S]; mask: as the model takes it."""
        inputs: dict[str, Any] = {"use_cache": False}
        if past is not None:
            if self.argument is None:
                raise TypeError(f"{type(self.model).__name__} takes no cache that can be forked")
            inputs = {self.argument: past, "use_cache": True}
        if positions is not None and self.takes_positions:
            inputs["position_ids"] = positions
        if mask is not None:
            inputs["attention_mask"] = mask
        return self.head(rows, ids, **inputs)

    def prefill(self, ids: Tensor, *, windowed: bool) -> Any:
        """The cache of tokens [1, P]. windowed: as the model keeps it; else every position in every layer."""
        past = kv_cache.new_cache(self.model, windowed=windowed)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        self(self.first, ids, past, positions=positions)
        return past

    @property
    def first(self) -> Tensor:
        """[1] the row that is read where none is wanted."""
        return torch.zeros(1, dtype=torch.long, device=self.device)


def vocabulary(model: nn.Module) -> int:
    """How many tokens a model's text config knows."""
    config: Any = model.config
    return int(config.get_text_config(decoder=True).vocab_size)
