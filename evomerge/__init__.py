"""Evolutionary search for merge recipes of language models."""

__version__ = "0.5.0"
