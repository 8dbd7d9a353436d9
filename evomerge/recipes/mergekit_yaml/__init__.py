"""Recipe <-> mergekit's YAML (version 0.1.5): the language alone, no tensors.

Reading resolves gradients and precedence into one number (or filter list) per output layer. Writing spells
out everything mergekit would otherwise guess: base, dtype, switches, filters with a catch-all, embeddings and
head.
"""

from __future__ import annotations

from evomerge.recipes.mergekit_yaml.reader import load
from evomerge.recipes.mergekit_yaml.writer import dump, with_outer_filters

__all__ = ["dump", "load", "with_outer_filters"]
