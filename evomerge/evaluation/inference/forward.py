"""One forward of a live model, with logits at selected rows only.

The only place that knows how a model is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.attention_masks import Windows, windows
from evomerge.evaluation.inference.selected_logits import RowHead, device_of, dtype_of

MAX_LOGITS = 1 << 26  # elements of logits that one forward may make


class Forward:
    """Calls a model, with or without a cache of past tokens.

    Attributes:
        model: The live model.
        head: Its `RowHead`.
        pad_id: Token id that rows are padded with.
        device: Where its inputs go.
        dtype: Its floating-point type.
        limits: Windows and chunks of its attention.
        vocabulary: Number of logits of a row.
        argument: What its forward calls the cache; None if it takes none that can be forked.
        takes_positions: Whether its forward takes `position_ids`.
    """

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
        """Runs the model.

        Args:
            rows: [N] flat indices into [B * S] of the rows whose logits are wanted.
            ids: [B, S] token ids.
            past: Cache of the tokens before, which grows by `ids`; None for none.
            positions: [B, S] logical positions; None lets the model count.
            mask: Attention mask, as the model takes it; None for none.

        Returns:
            [N, V] logits.

        Raises:
            TypeError: There is a cache, and the model takes none that can be forked.
        """
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
        """Computes the cache of a prefix.

        Args:
            ids: [1, P] token ids.
            windowed: True for a cache as the model keeps it; False to keep every position in every layer.

        Returns:
            The cache.
        """
        past = kv_cache.new_cache(self.model, windowed=windowed)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        self(self.first, ids, past, positions=positions)
        return past

    @property
    def first(self) -> Tensor:
        """[1] the row that is read where no logits are wanted."""
        return torch.zeros(1, dtype=torch.long, device=self.device)


def vocabulary(model: nn.Module) -> int:
    """Returns how many tokens a model knows.

    Args:
        model: A transformers model.

    Returns:
        `vocab_size` of its text config.
    """
    config: Any = model.config
    return int(config.get_text_config(decoder=True).vocab_size)
