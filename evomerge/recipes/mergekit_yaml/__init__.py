"""Recipe <-> mergekit's YAML (version 0.1.5): the language alone, no tensors.

`load` resolves gradients and precedence into one number (or filter list) per output layer. `dump` writes out
everything that mergekit would otherwise guess: base, dtype, switches, filters that end in one for all
tensors, embeddings and head.
"""

from __future__ import annotations

from evomerge.recipes.mergekit_yaml.load import load
from evomerge.recipes.mergekit_yaml.method_stages import by_method
from evomerge.recipes.mergekit_yaml.writer import dump, dump_documents, with_outer_filters

__all__ = ["by_method", "dump", "dump_documents", "load", "with_outer_filters"]
