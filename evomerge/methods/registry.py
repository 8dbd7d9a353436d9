"""The registry of merge methods: every `Method` that a module of `evomerge.methods` defines, found by itself.

Axes of a search, validation, YAML keys, documentation and the contract tests derive from `METHODS`, so that a
new method is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from evomerge.errors import RecipeError, suggest
from evomerge.methods.declaration import Method


def find_methods() -> dict[str, Method]:
    """Imports every module of `evomerge.methods` (not its subpackages) and collects the methods they define.

    Returns:
        Name -> method, sorted by name.

    Raises:
        ValueError: Two methods have one name.
    """
    methods: dict[str, Method] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        if module.ispkg or module.name == __name__:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if not isinstance(value, Method):
                continue
            if methods.setdefault(value.name, value) is not value:
                raise ValueError(
                    f"two merge methods have the name '{value.name}'; rename that of {module.name}"
                )
    return dict(sorted(methods.items()))


METHODS: dict[str, Method] = find_methods()
"""Every merge method by name, sorted by name."""


def method(name: str) -> Method:
    """Looks a merge method up.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        RecipeError: No method has that name; the message says the nearest one.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(f"unknown merge method {name[:80]!r}. {suggest(name, METHODS)}") from None
