"""Merge methods: one declaration and one kernel each, one paper a file.

`METHODS` is the only list of methods; axes of a search, validation, YAML keys, documentation and the contract tests
derive from it. `fused` merges weighted sums of task vectors in one pass over the parents.
"""

from __future__ import annotations

from evomerge.methods.declaration import Kernel, Method, Param, Values
from evomerge.methods.registry import METHODS, method

__all__ = ["METHODS", "Kernel", "Method", "Param", "Values", "method"]
