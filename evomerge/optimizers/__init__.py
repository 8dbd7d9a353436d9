"""Optimizers: arrays in, arrays out, higher scores are better. They know nothing of recipes or models."""

from __future__ import annotations

from evomerge.optimizers.base import Array, Optimizer

__all__ = ["Array", "Optimizer"]
