"""Entries of filter lists that decide no value: a filter in no name, or behind one that takes all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from evomerge._yaml import Key

TensorNames = Callable[[str], Collection[str]]
"""Model reference -> names of its tensors."""
FilterList = Sequence[tuple[Key, str]]
"""(key path, text) of the entries of one list; the text '*' is in every name."""
_IN_LAYER = re.compile(r"(.*?\.)\d+(\..+)")


def idle_filters(lists: Iterable[FilterList], names: Collection[str] | None) -> Iterator[tuple[Key, str]]:
    """Finds the entries that decide nothing.

    Args:
        lists: The filter lists of a document.
        names: Names of all tensors that they may be about; None: they are not known.

    Yields:
        (key path, sentence) of each such entry.
    """
    for entries in lists:
        rest = set(names or ())
        is_closed = False
        for path, text in entries:
            shown = "an entry for all tensors" if text == "*" else f"filter '{text[:80]}'"
            if is_closed:
                yield path, f"{shown} is never read: an entry before it takes every tensor"
                continue
            is_closed = text == "*"
            if names is None or is_closed:
                continue
            matched = {name for name in names if text in name}
            if not matched:
                yield path, f"{shown} is in no tensor's name, so its value is used nowhere"
            elif not matched & rest:
                yield path, f"{shown} is never read: entries before it take every tensor that it names"
            rest -= matched


def names_to_depth(names: Iterable[str], depth: int) -> set[str]:
    """Names of tensors, and what they are called in a stack of another depth.

    Args:
        names: Names of a model's tensors.
        depth: Number of layers of the stack.

    Returns:
        The names, and those of every layer with each index up to the depth.
    """
    found = set(names)
    for before, after in {match.groups() for match in map(_IN_LAYER.fullmatch, tuple(found)) if match}:
        found.update(f"{before}{index}{after}" for index in range(depth))
    return found
