"""The search file: keys, types, checks, and errors with line and column."""

from __future__ import annotations

from evomerge.config.schema import Config

__all__ = ["Config"]
