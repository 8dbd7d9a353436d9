"""Whether a technique may be used with a model, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """allowed: whether the technique gives this model's own numbers; reason: what was measured, or why it cannot run."""

    allowed: bool
    reason: str
