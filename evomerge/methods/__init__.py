"""Merge methods: one declaration and one kernel each, one paper a file.

`METHODS` is the only list of methods; axes of a search, validation, YAML keys, documentation and the property
tests derive from it.
"""

from __future__ import annotations

from evomerge.errors import RecipeError, suggest
from evomerge.methods.dare import DARE_LINEAR, DARE_TIES
from evomerge.methods.linear import LINEAR
from evomerge.methods.method import Kernel, Method, Param, Values
from evomerge.methods.passthrough import PASSTHROUGH
from evomerge.methods.slerp import SLERP
from evomerge.methods.task_arithmetic import TASK_ARITHMETIC
from evomerge.methods.ties import TIES

__all__ = ["METHODS", "Kernel", "Method", "Param", "Values", "method"]

METHODS: dict[str, Method] = {m.name: m for m in (LINEAR, SLERP, TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, PASSTHROUGH)}


def method(name: str) -> Method:
    """The method of that name; raises RecipeError with the nearest known name."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(f"unknown merge method '{name}'. {suggest(name, METHODS)}") from None
