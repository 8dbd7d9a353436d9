"""The search file: one YAML document that says what to merge, what to score it by and how to search.

`schema` has every key with its type, bounds, default and description; `loading` reads a file and checks it,
with `checks` for what blocks say of one another, `messages` for what is wrong with a single key, and
`renamed_keys` for keys that have another name now. `reference` lists all keys for the documentation. Loads no
torch until a file is checked.
"""

from __future__ import annotations

from evomerge.config.loading import load
from evomerge.config.schema import Config

__all__ = ["Config", "load"]
