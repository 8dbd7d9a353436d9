"""The exceptions by which transformers and torch refuse a model, config or tensor that they cannot handle."""

from __future__ import annotations

REFUSALS = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What is caught around code of transformers that runs on an architecture nobody has tried; never around our
own.
"""
