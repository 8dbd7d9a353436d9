"""Merge methods: one declaration and one kernel each, one paper a file.

`METHODS` is the only list of methods: every module here that defines a `Method` is in it, so that a new
method is one new file. Axes of a search, validation, YAML keys, documentation and the contract tests derive
from it. What a declaration says is in `declaration`; `fused` merges weighted sums of task vectors in one pass
over the parents, `random_masks` makes keyed masks, `dot_products` measures angles.
"""

from __future__ import annotations

from evomerge.methods.declaration import Kernel, Method, Param, Values
from evomerge.methods.registry import METHODS, method

__all__ = ["METHODS", "Kernel", "Method", "Param", "Values", "method"]
