"""Recipe <-> mergekit's YAML (version 0.1.5). Knows the language, runs nothing.

Reading resolves gradients and precedence into one number (or filter list) per output layer. Writing spells out
everything mergekit would otherwise guess: base, dtype, switches, filters with a catch-all, embeddings and head.
"""

from evomerge.mergekit_yaml.reader import load
from evomerge.mergekit_yaml.writer import dump, with_outer_filters

__all__ = ["dump", "load", "with_outer_filters"]
