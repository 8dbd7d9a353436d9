"""Logits only at the rows that are read, for any architecture.

The output embedding gets a forward pre-hook that gathers the wanted rows of the hidden states [B, S, H] into [1, N, H].
Whatever the model does before it (final norm, scaling) and after it (soft-caps, scaling, casts) stays its own code.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class RowHead:
    """Runs a model and returns the logits of chosen rows alone. A context manager: leaving it takes the hook off.

    works: whether the model really skipped the other rows; None before the first call. A model that does not call its
    output embedding once as a module is noticed, and the rows are taken from its full logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.works: bool | None = None
        self._rows: Tensor | None = None
        self._fired = 0
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._handle = head.register_forward_pre_hook(self._gather) if isinstance(head, nn.Module) else None

    def __enter__(self) -> RowHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, rows: Tensor, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits [N, V] of the rows [N]: flat indices into the batch and sequence [B * S] of input_ids [B, S]."""
        self._rows, self._fired = rows, 0
        try:
            logits: Tensor = self.model(input_ids=input_ids, **inputs).logits
        finally:
            self._rows = None
        if self._fired == 1 and logits.dim() == 3 and logits.shape[:2] == (1, rows.numel()):
            self.works = self.works is not False
            return logits[0]
        self.works = False
        if self._fired > 1:
            raise RuntimeError("the output embedding ran more than once in one forward")
        return logits.reshape(-1, logits.shape[-1]).index_select(0, rows)

    def _gather(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None or not inputs:
            return None
        self._fired += 1
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows)[None], *inputs[1:])


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's floating-point parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    return next(iter(model.parameters())).device
