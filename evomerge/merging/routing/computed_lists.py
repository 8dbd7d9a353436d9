"""Lists that a config's class computes, overruled for one config: the one place that swaps its class.

Some config classes of transformers have a property that computes a value for each layer from other values,
such as the kind of every layer from a period. No such value can be set, neither on the object nor in the
file; but modules of the model read it in every forward, so the config of a live route has to give the route's
list. It gets a subclass of its own class, with properties that return that list. The subclass must never
reach a saved file or a model built anew, which is why `restore_class` is called before either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ORIGINAL = "_evomerge_original_class"


def overrule(config: Any, lists: Mapping[str, Sequence[Any]]) -> None:
    """Makes properties of a config return other lists; without lists the config gets its own class back.

    Args:
        config: A config of transformers; other configs of its class are left alone.
        lists: Name of a property of its class -> the list that it returns from now on.
    """
    restore_class(config)
    if not lists:
        return
    original = type(config)
    body: dict[str, Any] = {name: _constant(values) for name, values in lists.items()}
    body |= {_ORIGINAL: original, "__module__": original.__module__}
    config.__class__ = type(original.__name__, (original,), body)


def restore_class(config: Any) -> None:
    """Gives a config back the class that it had before `overrule`.

    Args:
        config: A config of transformers, overruled or not.
    """
    config.__class__ = getattr(type(config), _ORIGINAL, type(config))


def _constant(values: Sequence[Any]) -> property:
    """A property that returns a new list of these values."""
    return property(lambda self: list(values))
