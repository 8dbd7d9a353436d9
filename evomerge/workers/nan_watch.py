"""Looks for NaN in the logits of live models without waiting for the device in a forward."""

from __future__ import annotations

import torch
from torch import nn


class NanWatch:
    """Flags on the device that any forward of a watched model may raise; they are read once, after scoring.

        watch = NanWatch()
        watch.add(model)
        watch.reset()
        ...  # score the model
        if watch.has_seen():
            ...

    The flags are made before any forward and written in place, as a captured CUDA graph needs it.
    """

    def __init__(self) -> None:
        """Watches nothing."""
        self._flags: dict[torch.device, torch.Tensor] = {}
        self._watched: set[int] = set()

    def add(self, model: nn.Module) -> None:
        """Has the logits of a model looked at from now on; a second time changes nothing.

        Args:
            model: a live model; one whose output embedding is no module is not watched.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if id(model) in self._watched or not isinstance(head, nn.Module):
            return
        for parameter in head.parameters():
            self._flag(parameter.device)
        head.register_forward_hook(self._look)
        self._watched.add(id(model))

    def reset(self) -> None:
        """Lowers all flags."""
        for flag in self._flags.values():
            flag.zero_()

    def has_seen(self) -> bool:
        """Waits for the device; whether logits were NaN since the last reset."""
        return any(bool(flag) for flag in self._flags.values())

    def _flag(self, device: torch.device) -> torch.Tensor:
        if device not in self._flags:
            self._flags[device] = torch.zeros((), dtype=torch.bool, device=device)
        return self._flags[device]

    def _look(self, head: nn.Module, inputs: object, logits: torch.Tensor) -> None:
        """A sum is NaN where a term is, and costs no copy of the logits."""
        total = logits.detach().sum(dtype=torch.float32)
        self._flag(logits.device).logical_or_(torch.isnan(total))
