"""Logits of selected rows only, for any architecture.

The output embedding gets a forward pre-hook that gathers the wanted rows of the hidden states [B, S, H] into
[1, N, H]. Whatever the model does before it (final norm, scaling) and after it (soft-caps, scaling, casts)
stays its own code.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class RowHead:
    """Runs a model and returns the logits of selected rows only.

    A context manager: leaving it removes the hook.

        with RowHead(model) as head:
            logits = head(rows, input_ids, use_cache=False)

    A model that does not call its output embedding exactly once as a module is noticed, and the rows are
    taken from its full logits.

    Attributes:
        model: The live model.
        works: Whether the model really skipped the other rows; None before the first call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.works: bool | None = None
        self._rows: Tensor | None = None
        self._calls = 0
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._handle = head.register_forward_pre_hook(self._gather) if isinstance(head, nn.Module) else None

    def __enter__(self) -> RowHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hook from the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, rows: Tensor, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Runs the model.

        Args:
            rows: [N] flat indices into [B * S].
            input_ids: [B, S] token ids.
            **inputs: Further inputs of the model.

        Returns:
            [N, V] logits of the rows.

        Raises:
            RuntimeError: The model called its output embedding more than once.
        """
        self._rows, self._calls = rows, 0
        try:
            logits: Tensor = self.model(input_ids=input_ids, **inputs).logits
        finally:
            self._rows = None
        if self._calls == 1 and logits.dim() == 3 and logits.shape[:2] == (1, rows.numel()):
            self.works = self.works is not False
            return logits[0]
        self.works = False
        if self._calls > 1:
            raise RuntimeError("the output embedding ran more than once in one forward")
        return logits.reshape(-1, logits.shape[-1]).index_select(0, rows)

    def _gather(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None or not inputs:
            return None
        self._calls += 1
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows)[None], *inputs[1:])


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the type of a model's floating-point parameters.

    Args:
        model: Any module with such parameters.

    Returns:
        The type of the first.
    """
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(model: nn.Module) -> torch.device:
    """Returns where a model's inputs go.

    Args:
        model: Any module with parameters.

    Returns:
        The device of the first.
    """
    return next(iter(model.parameters())).device
